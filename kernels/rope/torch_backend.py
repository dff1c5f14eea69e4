"""The rotation in plain torch: what the Triton kernel is held against, and what CPUs run."""

import torch


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rotated; transposed: by the transposed matrix, which is what gradients take."""
    wide = torch.promote_types(torch.promote_types(q.dtype, cos.dtype), torch.float32)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    return _rotated(q, cos, sin, transposed), _rotated(k, cos, sin, transposed)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    low, high = (sin[..., half:], sin[..., :half]) if transposed else (sin[..., :half], sin[..., half:])
    y[..., :half].addcmul_(x[..., half:], low, value=1 if transposed else -1)
    y[..., half:].addcmul_(x[..., :half], high, value=-1 if transposed else 1)
    return y.to(x.dtype)
