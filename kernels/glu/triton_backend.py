# mypy: disable-error-code="no-untyped-def"
"""Gated linear units as Triton kernels: a program is a stretch of one row. The same arguments as torch_backend.py."""

import torch
import triton
import triton.language as tl

from tunesmith.kernels.blocks import Block, Table, block, choose

BLOCKS: Table = {90: [block(4, 2, BLOCK_F=2048)], 80: [block(4, 2, BLOCK_F=2048)], 0: [block(4, 1, BLOCK_F=64)]}
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0


@triton.jit
def _share(g, ACTIVATION: tl.constexpr):
    """p with activation(g) = g * p, and the slope of p."""
    if ACTIVATION == "gelu":
        p = 0.5 + 0.5 * tl.erf(g * SQRT_HALF)
        slope = DENSITY * tl.exp(-0.5 * g * g)
    else:
        z, dz = g, 1.0
        if ACTIVATION == "gelu_tanh":
            z = SQRT_8_OVER_PI * (g + 0.044715 * g * g * g)
            dz = SQRT_8_OVER_PI * (1 + 3 * 0.044715 * g * g)
        e = tl.exp(-tl.abs(z))  # never overflows
        p = tl.where(z < 0, e, 1.0) / (1 + e)
        slope = e / ((1 + e) * (1 + e)) * dz
    return p, slope


@triton.jit
def glu_forward(
    gate, up, y, F, gate_stride, up_stride, y_stride, ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: N * F passes 2^31
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    g = tl.load(gate + row * gate_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    p, _ = _share(g, ACTIVATION)
    tl.store(y + row * y_stride + columns, (g * p * u).to(y.dtype.element_ty), mask=columns < F)


@triton.jit
def glu_backward(
    dy, gate, up, dgate, dup, F, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    d = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    p, slope = _share(g, ACTIVATION)
    tl.store(dgate + row * dgate_stride + columns, (d * u * (p + g * slope)).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * dup_stride + columns, (d * g * p).to(dup.dtype.element_ty), mask=inside)


def _launch(kernel: str, x_NF: torch.Tensor) -> tuple[tuple[int, int], Block]:
    rows, features = x_NF.shape
    sizes = choose(f"glu.{kernel}", BLOCKS, x_NF.device, (features,))
    return (rows, triton.cdiv(features, sizes["BLOCK_F"])), sizes


def forward(gate_NF: torch.Tensor, up_NF: torch.Tensor, y_NF: torch.Tensor, activation: str) -> None:
    """Fills y."""
    grid, sizes = _launch("forward", y_NF)
    tensors = gate_NF, up_NF, y_NF
    glu_forward[grid](
        *tensors, y_NF.shape[1], *(tensor.stride(0) for tensor in tensors), ACTIVATION=activation, **sizes.launch
    )


def backward(
    dy_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    dgate_NF: torch.Tensor,
    dup_NF: torch.Tensor,
    activation: str,
) -> None:
    """Fills the gradients of gate and up."""
    grid, sizes = _launch("backward", dy_NF)
    tensors = dy_NF, gate_NF, up_NF, dgate_NF, dup_NF
    glu_backward[grid](
        *tensors, dy_NF.shape[1], *(tensor.stride(0) for tensor in tensors), ACTIVATION=activation, **sizes.launch
    )
