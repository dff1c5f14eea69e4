"""RMSNorm in plain torch: what the Triton kernels are held against, and what CPUs run. The same saved tensors.

Few passes, each into memory that is there already: on a CPU a fresh [N, D] tensor costs more than the arithmetic.
"""

import torch

from tunesmith.kernels.device import without_autocast


def forward(
    x_ND: torch.Tensor, weight_D: torch.Tensor, y_ND: torch.Tensor, eps: float, one_plus: bool, round_first: bool
) -> torch.Tensor:
    """Fills y; returns rstd, [N], float32 or wider."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    rstd_N = torch.linalg.vector_norm(x_ND, dim=1, dtype=wide).square_().div_(x_ND.shape[1]).add_(eps).rsqrt_()
    factor_D = weight_D if round_first and not one_plus else weight_D.to(wide) + int(one_plus)
    if wide == x_ND.dtype:
        torch.mul(x_ND, rstd_N[:, None], out=y_ND).mul_(factor_D)
        return rstd_N
    normed_ND = x_ND * rstd_N[:, None]
    y_ND.copy_((normed_ND.to(x_ND.dtype) if round_first else normed_ND) * factor_D)
    return rstd_N


def backward(
    dy_ND: torch.Tensor,
    x_ND: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_N: torch.Tensor,
    dx_ND: torch.Tensor,
    one_plus: bool,
    *,
    wants_weight: bool,
) -> torch.Tensor | None:
    """Fills dx; returns the gradient of the weight where it is wanted."""
    wide, along_x = rstd_N.dtype, -1 / x_ND.shape[1]
    factor_D = weight_D.to(wide) + 1 if one_plus else weight_D.to(wide)
    x_ND = x_ND.to(wide)
    scratch_ND = torch.mul(dy_ND, x_ND, out=dx_ND if dx_ND.dtype == wide else None)
    with without_autocast(x_ND.device):
        dweight_D = torch.mv(scratch_ND.t(), rstd_N).to(weight_D.dtype) if wants_weight else None
        sums_N = torch.mv(scratch_ND, factor_D).mul_(rstd_N).mul_(rstd_N)
    torch.mul(dy_ND, factor_D, out=scratch_ND).addcmul_(x_ND, sums_N[:, None], value=along_x).mul_(rstd_N[:, None])
    if scratch_ND is not dx_ND:
        dx_ND.copy_(scratch_ND)
    return dweight_D
