# mypy: disable-error-code="no-untyped-def"
"""RMSNorm as Triton kernels: a program holds whole rows. The same arguments as torch_backend.py.

The weight's gradient is added up in registers over a chunk of rows, and the chunks' sums by torch: no atomics, bitwise
repeatable.
"""

import torch
import triton
import triton.language as tl

from tunesmith.kernels.blocks import Block, Table, block, choose
from tunesmith.kernels.device import num_multiprocessors

LEAST_D, MOST_D = 64, 8192  # of a tile; wider rows would spill
MOST_ODD_D = 4096  # where rows do not begin at multiples of 16 elements, so that nothing is loaded in vectors
PROGRAMS_PER_MULTIPROCESSOR = 4  # of the backward pass with a weight: each leaves a float32 row behind
UNTYPED = ["N", "chunk"]  # another number of rows must not compile a kernel anew


def covers(features: int) -> bool:
    """Whether a row fits into a program."""
    return features <= (MOST_ODD_D if features % 16 else MOST_D)


def row_blocks(kernel: str, features: int) -> Table:
    """Tiles of about 4,096 elements, 16 a thread; of the backward pass, which holds four at once, 2,048, 8 a thread (at
    16, one spills on sm_80).
    """
    columns = min(max(LEAST_D, triton.next_power_of_2(features)), MOST_D)
    elements, a_warp = (4096, 512) if kernel == "forward" else (2048, 256)
    rows = max(1, elements // columns)
    found = [block(min(16, max(4, rows * columns // a_warp)), 2, BLOCK_N=rows, BLOCK_D=columns)]
    return {90: found, 80: found, 0: [block(4, 1, BLOCK_N=8, BLOCK_D=columns)]}


@triton.jit(do_not_specialize=["N"])
def rms_norm_forward(
    x_ND, weight_D, y_ND, rstd_N, N, D, eps,
    ONE_PLUS: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]  # int64: N * D passes 2^31
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    x = tl.load(x_ND + places, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(rstd_N + rows, rstd, mask=rows < N)
    normed = x * rstd[:, None]
    if ROUND_FIRST:
        normed = normed.to(y_ND.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_D + columns, mask=columns < D, other=0.0).to(tl.float32)
    if ONE_PLUS:
        weight += 1
    tl.store(y_ND + places, (normed * weight[None, :]).to(y_ND.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNTYPED)
def rms_norm_backward(
    dy_ND, x_ND, weight_D, rstd_N, dx_ND, dweight_parts, N, D, chunk,
    ONE_PLUS: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """chunk rows a program; dweight_parts is [programs, D], float32."""
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    within = columns[None, :] < D
    weight = tl.load(weight_D + columns, mask=columns < D, other=0.0).to(tl.float32)
    if ONE_PLUS:
        weight += 1
    dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(part * chunk, tl.minimum(N, (part + 1) * chunk), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        places = rows.to(tl.int64)[:, None] * D + columns[None, :]
        inside = (rows[:, None] < N) & within
        rstd = tl.load(rstd_N + rows, mask=rows < N, other=0.0)
        normed = tl.load(x_ND + places, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
        dy = tl.load(dy_ND + places, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            dweight += dy * normed
        dy *= weight[None, :]
        along = tl.sum(dy * normed, 1) / D
        dx = (dy - normed * along[:, None]) * rstd[:, None]
        tl.store(dx_ND + places, dx.to(dx_ND.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(dweight_parts + part.to(tl.int64) * D + columns, tl.sum(dweight, 0), mask=columns < D)


def _sizes(kernel: str, features: int, device: torch.device) -> Block:
    return choose(f"rms_norm.{kernel}", row_blocks(kernel, features), device, (features,))


def forward(
    x_ND: torch.Tensor, weight_D: torch.Tensor, y_ND: torch.Tensor, eps: float, one_plus: bool, round_first: bool
) -> torch.Tensor:
    """Fills y; returns rstd, [N], float32."""
    rows, features = x_ND.shape
    rstd_N = x_ND.new_empty(rows, dtype=torch.float32)
    sizes = _sizes("forward", features, x_ND.device)
    rms_norm_forward[(triton.cdiv(rows, sizes["BLOCK_N"]),)](
        x_ND, weight_D, y_ND, rstd_N, rows, features, eps, ONE_PLUS=one_plus, ROUND_FIRST=round_first, **sizes.launch
    )
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
    rows, features = x_ND.shape
    sizes = _sizes("backward", features, x_ND.device)
    num_blocks = triton.cdiv(rows, sizes["BLOCK_N"])
    most = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(x_ND.device) if wants_weight else num_blocks
    chunk = triton.cdiv(num_blocks, most) * sizes["BLOCK_N"]
    programs = triton.cdiv(rows, chunk)
    parts = x_ND.new_empty((programs, features) if wants_weight else (1,), dtype=torch.float32)
    rms_norm_backward[(programs,)](
        dy_ND, x_ND, weight_D, rstd_N, dx_ND, parts, rows, features, chunk,
        ONE_PLUS=one_plus, WEIGHT=wants_weight, **sizes.launch,
    )  # fmt: skip
    return parts.sum(0).to(weight_D.dtype) if wants_weight else None
