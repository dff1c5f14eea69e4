"""Gated linear units (arXiv:2002.05202): activation(gate) * up.

    silu       g * sigmoid(g)                                         SwiGLU, Llama
    gelu_tanh  g * sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))         GeGLU, Gemma; the usual tanh form, rewritten
    gelu       g * (1 + erf(g / sqrt(2))) / 2

computed in float32 and rounded once. Kept for the backward pass: gate and up, not the activation between them; both
gradients are one pass. N rows of any leading dims, F features.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tunesmith.kernels.device import on_its_device
from tunesmith.kernels.glu import torch_backend
from tunesmith.kernels.leaf_backend import Backend, is_triton

ACTIVATIONS = "silu", "gelu_tanh", "gelu"


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str, *, backend: Backend = "auto") -> torch.Tensor:
    """activation(gate) * up, differentiable once in both.

    Args:
        gate, up: [..., F], bfloat16, float16 or float32 (and float64 in plain torch), of one shape.
        activation: one of ACTIVATIONS.
    Returns: [..., F], contiguous, dtype of gate.
    Raises: ValueError when shapes, dtypes or devices do not fit.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate is {gate.dtype} {list(gate.shape)} on {gate.device}, and up is {up.dtype} {list(up.shape)} on "
            f"{up.device}: they must be alike."
        )
    return Glu.apply(_back_end(backend, gate, activation), gate, up, activation)


def glu_packed(gate_up: torch.Tensor, activation: str, *, backend: Backend = "auto") -> torch.Tensor:
    """glu() of the two halves of one tensor, gate first, [..., 2 F]; its gradient is one tensor too."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} features, which are no two halves.")
    return GluPacked.apply(_back_end(backend, gate_up, activation), gate_up, activation)


def _back_end(backend: Backend, x: torch.Tensor, activation: str) -> Any:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    if not is_triton(backend, x):
        return torch_backend
    from tunesmith.kernels.glu import triton_backend  # here: importing triton is for machines that run it

    return triton_backend


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class Glu(torch.autograd.Function):
    """apply(back_end, gate, up, activation) -> y."""

    @staticmethod
    def forward(ctx: Any, back_end: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        with on_its_device(gate.device):
            back_end.forward(_rows(gate), _rows(up), _rows(y), activation)
        ctx.save_for_backward(gate, up)
        ctx.back_end, ctx.activation = back_end, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        dy_NF = _rows(dy).contiguous()
        ctx.back_end.backward(dy_NF, _rows(gate), _rows(up), _rows(dgate), _rows(dup), ctx.activation)
        return None, dgate, dup, None


class GluPacked(torch.autograd.Function):
    """apply(back_end, gate_up, activation) -> y."""

    @staticmethod
    def forward(ctx: Any, back_end: Any, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        with on_its_device(gate_up.device):
            back_end.forward(*_rows(gate_up).chunk(2, 1), _rows(y), activation)
        ctx.save_for_backward(gate_up)
        ctx.back_end, ctx.activation = back_end, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        halves = (*_rows(gate_up).chunk(2, 1), *_rows(gradient).chunk(2, 1))
        ctx.back_end.backward(_rows(dy).contiguous(), *halves, ctx.activation)
        return None, gradient, None
