"""What the anchored loss cannot hold: rows whose label is more than 69 nats below another token.

Their E has reached RESCUE. They are done again with their own largest distance as the offset, in two products: one for
the largest, one for E. A product goes by tiles of rows, and passes over a tile without such a row: however many there
are, the head is read no more than twice a tile. Nothing waits for the GPU to tell how many: there are hardly ever any,
and then every program looks at the sums and ends.

C rows of a chunk, D hidden, V vocabulary; tiles of the vocabulary are those of the first product.
"""

import torch
import triton
import triton.language as tl

from tunesmith.kernels.blocks import Block, block, even
from tunesmith.kernels.device import INTERPRETED, arch, num_multiprocessors
from tunesmith.kernels.lce.anchored_kernels import LOWEST, OFFSET, distances, finish_tile, product
from tunesmith.kernels.lce.row_math import ROW_VECTORS, ROWS

RESCUE = tl.constexpr(2.0**60)  # a sum of E that can hold one that was cut off, at anchored_kernels.LARGEST
SUMS_AT_ONCE: tl.constexpr = tl.constexpr(1024)
TOPS_AT_ONCE: tl.constexpr = tl.constexpr(64)


@triton.jit
def _lost(sums, label_C, rows, C):
    """Which rows are to be done again. A row of NaN stays one: there is nothing to find in it."""
    label = tl.load(label_C + rows, mask=rows < C, other=0.0)
    return (tl.load(sums + rows, mask=rows < C, other=0.0) >= RESCUE) & (label == label)


@triton.jit
def _any_lost(sums, label_C, C):
    lost = tl.zeros((SUMS_AT_ONCE,), tl.int32)
    for start in range(0, C, SUMS_AT_ONCE):
        lost |= _lost(sums, label_C, start + tl.arange(0, SUMS_AT_ONCE), C).to(tl.int32)
    return tl.max(lost, 0) > 0


@triton.jit
def _largest(tops, rows, lost, tiles_V, BLOCK_C: tl.constexpr):
    """The largest distance of each lost row, over all tiles of the vocabulary."""
    largest = tl.full((BLOCK_C, TOPS_AT_ONCE), LOWEST, tl.float32)
    for start in range(0, tiles_V, TOPS_AT_ONCE):
        at = start + tl.arange(0, TOPS_AT_ONCE)
        places = tops + rows.to(tl.int64)[:, None] * tiles_V + at[None, :]
        found = tl.load(places, mask=lost[:, None] & (at[None, :] < tiles_V), other=LOWEST)
        largest = tl.maximum(largest, found)
    return tl.max(largest, 1)


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=ROW_VECTORS)
def lce_rescue_kernel(
    x, w, bias, label_C, own_C, e, partial, sums, tops, offset_C, C, V, D, e_stride, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STORE: tl.constexpr, STATS: tl.constexpr, WIDEN: tl.constexpr,
    LOOK: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of lost rows: with LOOK, tops[row, tile] = largest distance; without, E, partial and the offset from those."""
    tiles_C, tiles_V = tl.cdiv(C, BLOCK_C), tl.cdiv(V, BLOCK_V)
    if _any_lost(sums, label_C, C):
        for number in range(tl.program_id(0), tiles_C * tiles_V, PROGRAMS):
            tile = number // tiles_C
            rows = (number % tiles_C) * BLOCK_C + tl.arange(0, BLOCK_C)
            cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            lost = _lost(sums, label_C, rows, C)
            if tl.max(lost.to(tl.int32), 0) > 0:
                acc = product(x, w, rows, cols, C, V, D, WIDEN, BLOCK_C, BLOCK_V, BLOCK_D)
                if LOOK:
                    d, _, keep = distances(acc, rows, cols, bias, label_C, own_C, C, V, scale, cap, HAS_BIAS, HAS_CAP)
                    top = tl.max(tl.where(keep, d, LOWEST), 1)
                    tl.store(tops + rows.to(tl.int64) * tiles_V + tile, top, mask=lost)
                else:
                    offset = _largest(tops, rows, lost, tiles_V, BLOCK_C)
                    powers = finish_tile(
                        acc, rows, cols, tile, tiles_V, bias, label_C, own_C, partial, C, V, scale, cap,
                        offset[:, None], lost, HAS_BIAS, HAS_CAP, STATS,
                    )  # fmt: skip
                    tl.store(offset_C + rows, offset, mask=lost & (tile == 0))
                    if STORE:
                        place = e + rows.to(tl.int64)[:, None] * e_stride + cols[None, :]
                        tl.store(place, powers.to(e.dtype.element_ty), mask=lost[:, None] & (cols[None, :] < V))


def blocks_of(first: Block, device: torch.device, vectors: bool) -> Block:
    """Tiles as wide as those of the first product, whose sums are replaced, and low: there are few lost rows."""
    if arch(device) == 0:
        return first
    return block(8, 2, BLOCK_C=64 if vectors else 32, BLOCK_V=first["BLOCK_V"], BLOCK_D=32)


def rescue(
    tensors: tuple[torch.Tensor | None, ...],
    partial: torch.Tensor,
    sum_C: torch.Tensor,
    numbers: tuple[int | float, ...],
    flags: dict[str, bool],
    first: Block,
) -> torch.Tensor:
    """The offsets of all rows, [C]; E and partial are put right where rows were lost. Arguments are lce_gemm_kernel's,
    and the sum of E of each row.
    """
    offset_C = torch.full_like(sum_C, OFFSET.value)
    tops = torch.empty(partial.shape[1:], dtype=torch.float32, device=partial.device)
    hidden_CD, unembed_VD = tensors[:2]
    assert hidden_CD is not None
    assert unembed_VD is not None
    sizes = blocks_of(first, partial.device, even(hidden_CD.shape[1], hidden_CD, unembed_VD))
    num_rows, tiles_V = tops.shape
    most = num_multiprocessors(partial.device)
    grid = (min(most, triton.cdiv(num_rows, sizes["BLOCK_C"]) * tiles_V),)
    for look in (True, False):
        lce_rescue_kernel[grid](
            *tensors, partial, sum_C, tops, offset_C, *numbers, **flags, WIDEN=INTERPRETED, LOOK=look, PROGRAMS=most,
            **sizes.launch,
        )  # fmt: skip
    return offset_C
