"""Rotary position embedding (arXiv:2104.09864) of queries and keys, as transformers' apply_rotary_pos_emb has it:

    y = x * cos + rotate_half(x) * sin,    rotate_half([a, b]) = [-b, a] of the two halves of the last dim

computed in float32 and rounded once. The backward pass is the transposed rotation; it keeps cos and sin alone.
B sequences, T positions, H query heads, G key heads, K features of a head.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tunesmith.kernels.device import on_its_device
from tunesmith.kernels.leaf_backend import Backend, is_triton
from tunesmith.kernels.rope import torch_backend


def rope(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    cos_BTK: torch.Tensor,
    sin_BTK: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, rotated; differentiable once in q and k.

    Args:
        q_BHTK, k_BGTK: [B, H, T, K] and [B, G, T, K] of one dtype, K even. Any strides but along K.
        cos_BTK, sin_BTK: [B or 1, T, K], of any float dtype; they have no gradient.
    Returns: the rotated q and k, in their dtype. They and gradients lie in memory as projections do, [B, T, H, K].
    Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    batch, _, positions, features = q_BHTK.shape
    shapes = {(batch, positions, features), (1, positions, features)}
    fits = k_BGTK.shape == (batch, k_BGTK.shape[1], positions, features) and features % 2 == 0
    fits &= cos_BTK.shape == sin_BTK.shape and tuple(cos_BTK.shape) in shapes and cos_BTK.dtype == sin_BTK.dtype
    tensors = {"q_BHTK": q_BHTK, "k_BGTK": k_BGTK, "cos_BTK": cos_BTK, "sin_BTK": sin_BTK}
    if not fits or q_BHTK.dtype != k_BGTK.dtype or len({tensor.device for tensor in tensors.values()}) > 1:
        given = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{given}: they do not fit each other, or lie on different devices.")
    back_end: Any = torch_backend
    if is_triton(backend, q_BHTK):
        from tunesmith.kernels.rope import triton_backend  # here: importing triton is for machines that run it

        back_end = triton_backend
    return Rope.apply(back_end, q_BHTK, k_BGTK, cos_BTK, sin_BTK)


class Rope(torch.autograd.Function):
    """apply(back_end, q, k, cos, sin) -> rotated q and k."""

    @staticmethod
    def forward(
        ctx: Any, back_end: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.back_end = back_end
        with on_its_device(q.device):
            return back_end.rotate(q, k, cos, sin, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return None, *ctx.back_end.rotate(dq, dk, cos, sin, transposed=True), None, None
