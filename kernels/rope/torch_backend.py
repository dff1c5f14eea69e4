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
    B, H, T, K = x.shape
    y = torch.mul(x, cos, out=x.new_empty(B, T, H, K, dtype=cos.dtype).transpose(1, 2))
    (a, b), (y_a, y_b), (sin_a, sin_b) = x.chunk(2, -1), y.chunk(2, -1), sin.chunk(2, -1)
    if transposed:
        y_a.addcmul_(b, sin_b)
        y_b.addcmul_(a, sin_a, value=-1)
    else:
        y_a.addcmul_(b, sin_a, value=-1)
        y_b.addcmul_(a, sin_b)
    return y.to(x.dtype)
