"""The passes of the LoRA matmul in plain torch: what the Triton kernels are held against, and what CPUs run.

The same arithmetic, the same dropout mask and the same saved tensors as triton_backend.py, function for function.
"""

import torch

from tunesmith.kernels.philox import Dropout

RANK_STEP = 1  # ranks are stored as they are


def down(x_NK: torch.Tensor, a_RK: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """u[N, R] = drop(x) A^T, without dropout's factor."""
    return _dropped(x_NK, dropout) @ a_RK.t()


def up(u_NR: torch.Tensor, b_OR: torch.Tensor, scale: float, bias_O: torch.Tensor | None) -> torch.Tensor:
    """y[N, O] = scale * u B^T + bias; u holds this adapter's ranks first."""
    u_NR = u_NR[:, : b_OR.shape[1]]
    if bias_O is not None:
        return torch.addmm(bias_O, u_NR, b_OR.t(), alpha=scale)
    y_NO = u_NR.new_empty(len(u_NR), len(b_OR))
    return torch.addmm(y_NO, u_NR, b_OR.t(), beta=0, alpha=scale, out=y_NO)


def grad_up(
    dy_NO: torch.Tensor,
    u_NR: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
    du_NR: torch.Tensor | None,
    *,
    wants_b: bool,
) -> torch.Tensor | None:
    """Writes scale * dy B into du and returns dB[O, r] = scale * dy^T u. u and du begin with this adapter's ranks."""
    rank = b_OR.shape[1]
    if du_NR is not None:
        torch.mul(dy_NO @ b_OR, scale, out=du_NR[:, :rank])
    return (dy_NO.t() @ u_NR[:, :rank]).mul_(scale) if wants_b else None


def grad_down(
    x_NK: torch.Tensor | None,
    du_NR: torch.Tensor,
    a_RK: torch.Tensor,
    dropout: Dropout | None,
    *,
    wants_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dA[R, K] = du^T drop(x), where x is given, and dx[N, K] = drop(du A), where it is wanted."""
    kept = dropout.keep(len(du_NR), a_RK.shape[1], du_NR.device) if dropout else None
    da_RK = dx_NK = None
    if x_NK is not None:
        da_RK = du_NR.t() @ (x_NK if kept is None else torch.where(kept, x_NK, 0))
    if wants_x:
        dx_NK = du_NR @ a_RK
        if kept is not None:
            dx_NK.masked_fill_(~kept, 0)
    return da_RK, dx_NK


def drop(x_NK: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Dropout by itself: x / (1 - p) where the mask keeps an element, else 0."""
    return _dropped(x_NK, dropout) * dropout.keep_scale


def _dropped(x_NK: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    rows, columns = x_NK.shape
    return torch.where(dropout.keep(rows, columns, x_NK.device), x_NK, 0) if dropout else x_NK
