"""RMSNorm (arXiv:1910.07467), over the last dimension:

    y = weight * x * rsqrt(mean(x^2) + eps)

computed in float32 at least. Kept for the backward pass: x, the weight and one float32 number a row. With
n = x * rsqrt(mean(x^2) + eps), r that factor and g = dy * weight,

    dx = r * (g - n * mean(g * n)),    dweight = sum over rows of dy * n

Models differ in two things: Gemma's factor is 1 + weight, and Llama rounds n to the dtype of x before it multiplies.
N rows of any leading dims, D features.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tunesmith.kernels.device import on_its_device
from tunesmith.kernels.leaf_backend import Backend, is_triton
from tunesmith.kernels.rms_norm import torch_backend


def rms_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    one_plus: bool = False,
    round_first: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """RMSNorm, differentiable once in x and the weight; no gradient of a frozen weight is computed.

    Args:
        x: [..., D], bfloat16, float16 or float32 (and float64 in plain torch). Rows may lie in memory in any order.
        weight_D: [D], dtype and device of x.
        one_plus: the factor is 1 + weight.
        round_first: the normed x is rounded to its dtype before it is multiplied.
    Returns: [..., D], dtype of x, laid out in memory as x.
    Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    if weight_D.shape != x.shape[-1:] or weight_D.dtype != x.dtype or weight_D.device != x.device:
        raise ValueError(
            f"weight_D is {weight_D.dtype} {list(weight_D.shape)} on {weight_D.device}, and x is {x.dtype} "
            f"{list(x.shape)} on {x.device}: it must be [D], of the dtype and on the device of x."
        )
    back_end: Any = torch_backend
    if is_triton(backend, x):
        from tunesmith.kernels.rms_norm import triton_backend  # here: importing triton is for machines that run it

        back_end = triton_backend if triton_backend.covers(x.shape[-1]) else torch_backend
    return RmsNorm.apply(back_end, x, weight_D, eps, one_plus, round_first)


def _memory_order(x: torch.Tensor) -> list[int] | None:
    """The dims from the outermost in memory to the innermost, where x is dense and its last dim the innermost."""
    order = [*sorted(range(x.ndim - 1), key=x.stride, reverse=True), x.ndim - 1]
    return order if x.permute(order).is_contiguous() else None


def _rows(x: torch.Tensor, order: list[int] | None) -> torch.Tensor:
    """[N, D], contiguous, in an order of the dims; a view where x lies so."""
    return (x if order is None else x.permute(order)).contiguous().view(-1, x.shape[-1])


class RmsNorm(torch.autograd.Function):
    """apply(back_end, x, weight, eps, one_plus, round_first) -> y."""

    @staticmethod
    def forward(
        ctx: Any, back_end: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float, one_plus: bool, round_first: bool
    ) -> torch.Tensor:
        order = None if x.is_contiguous() else _memory_order(x)
        x = x if order else x.contiguous()
        y = torch.empty_like(x)
        with on_its_device(x.device):
            rstd_N = back_end.forward(_rows(x, order), weight_D, _rows(y, order), eps, one_plus, round_first)
        ctx.save_for_backward(x, weight_D, rstd_N)
        ctx.back_end, ctx.order, ctx.one_plus = back_end, order, one_plus
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight_D, rstd_N = ctx.saved_tensors
        order = ctx.order
        dx = torch.empty_like(x)
        dweight_D = ctx.back_end.backward(
            _rows(dy, order), _rows(x, order), weight_D, rstd_N, _rows(dx, order), ctx.one_plus,
            wants_weight=ctx.needs_input_grad[2],
        )  # fmt: skip
        return None, dx, dweight_D, None, None, None
