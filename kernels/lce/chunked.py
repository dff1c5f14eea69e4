"""linear_cross_entropy by chunks: cuBLAS makes the logits, one Triton kernel a row turns them into their gradient in
place, cuBLAS makes the gradients of hidden states and head from that.

C rows of a chunk, D hidden, V vocabulary. The slab of logits is [C, V] in the dtype of the hidden
states, so for 16-bit inputs the logits are rounded once; the anchored back end does not round them.
"""

import torch
import triton
import triton.language as tl

from tunesmith.kernels.blocks import Table, block, choose
from tunesmith.kernels.lce.head import Head, Rows
from tunesmith.kernels.lce.row_math import LOG2E, ROW_VECTORS, ROWS, capped, entropy_of, from_margin

# A thread keeps its own maximum and sum: one reduction a row. Larger blocks with a scalar maximum spill (318 stores).
ROW_BLOCKS = {
    90: [block(8, 2, BLOCK_V=4096), block(8, 3, BLOCK_V=2048), block(4, 3, BLOCK_V=2048)],
    80: [block(8, 2, BLOCK_V=4096), block(8, 3, BLOCK_V=2048), block(4, 3, BLOCK_V=2048)],
    0: [block(4, 1, BLOCK_V=256)],
}
# A soft cap and statistics take more registers.
RICH_ROW_BLOCKS = ROW_BLOCKS | {key: [block(8, 3, BLOCK_V=2048), block(4, 3, BLOCK_V=1024)] for key in (90, 80)}
ROW_ALIGNMENT = 64  # elements: rows of the slab start on 128 bytes, also for an odd vocabulary
GROUP = tl.constexpr(8)  # neighbours in a row that one thread reads at once, 16 bytes of 16-bit logits
LOWEST = tl.constexpr(-1.0e38)  # below every logit, and finite: the difference of two of them is 0, not NaN

NLL, ENTROPY, CORRECT = range(3)  # rows of `out`


@triton.jit
def _logits(row, bias, cols, V, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EDGE: tl.constexpr):
    """softcap(scale * (h . w + b)) at some columns, and the slope."""
    z = tl.load(row + cols, mask=cols < V, other=0.0) if EDGE else tl.load(row + cols)
    z = z.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=cols < V, other=0.0)
    z *= scale
    slope = 1.0
    if HAS_CAP:
        z, slope = capped(z, cap)
    return z, slope


@triton.jit
def _tiles(own, V, BLOCK_V: tl.constexpr):
    """How many tiles are whole and without the label, the label's tile, and how many tiles there are."""
    own_tile = (own // BLOCK_V).to(tl.int32)
    whole = V // BLOCK_V
    return whole - (own_tile < whole).to(tl.int32), own_tile, tl.cdiv(V, BLOCK_V)


@triton.jit
def _start(number, num_inner, own_tile, V, BLOCK_V: tl.constexpr, EDGE: tl.constexpr):
    """Where a tile begins. First come the inner ones, then at the edge the label's and what is left of V."""
    inner = number + (number >= own_tile).to(tl.int32)
    return (tl.where(number == num_inner, own_tile, V // BLOCK_V) if EDGE else inner) * BLOCK_V


@triton.jit
def _add_tile(
    row, bias, cols, own, V, scale, cap, largest, exps, weighted,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STATS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the maximum, the sum of e = exp(logit - maximum) and of e * (logit - maximum) of each group."""
    z, _ = _logits(row, bias, cols, V, scale, cap, HAS_BIAS, HAS_CAP, EDGE)
    if EDGE:
        other = (cols < V) & (cols != own)
        z = tl.where(other, z, LOWEST)
    higher = tl.maximum(largest, tl.max(tl.where(z > LOWEST, z, LOWEST), 1))  # NaN is never the largest
    shrink = tl.exp2((largest - higher) * LOG2E)
    below = z - higher[:, None]
    e = tl.exp2(below * LOG2E)
    if EDGE:
        e = tl.where(other, e, 0.0)
    if STATS:
        weighted = (weighted + exps * (largest - higher)) * shrink + tl.sum(e * tl.where(e > 0, below, 0.0), 1)
    exps = exps * shrink + tl.sum(e, 1)
    return higher, exps, weighted


@triton.jit
def _sums(
    row, bias, lanes, own, num_inner, own_tile, num_tiles, V, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STATS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One pass over a row: of the logits but the label's the maximum, the sum of e = exp(logit - maximum) and of
    e * (logit - maximum).
    """
    largest = tl.full((BLOCK_V // GROUP,), LOWEST, tl.float32)
    exps = tl.zeros((BLOCK_V // GROUP,), tl.float32)
    weighted = tl.zeros((BLOCK_V // GROUP,), tl.float32)
    for number in range(num_inner):
        cols = lanes + _start(number, num_inner, own_tile, V, BLOCK_V, False)
        largest, exps, weighted = _add_tile(
            row, bias, cols, own, V, scale, cap, largest, exps, weighted, HAS_BIAS, HAS_CAP, STATS, False
        )
    for number in range(num_inner, num_tiles):
        cols = lanes + _start(number, num_inner, own_tile, V, BLOCK_V, True)
        largest, exps, weighted = _add_tile(
            row, bias, cols, own, V, scale, cap, largest, exps, weighted, HAS_BIAS, HAS_CAP, STATS, True
        )
    top = tl.max(largest, 0)
    lift = tl.exp2((largest - top) * LOG2E)
    weighted = (weighted + exps * (largest - top)) * lift
    return top, tl.sum(exps * lift, 0), tl.sum(weighted, 0)


@triton.jit
def _write_tile(
    row, bias, cols, own, V, scale, cap, largest, others_factor, label_factor,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    z, slope = _logits(row, bias, cols, V, scale, cap, HAS_BIAS, HAS_CAP, EDGE)
    if EDGE:
        z = tl.where((cols < V) & (cols != own), z, largest)
    grad = others_factor * tl.exp2((z - largest) * LOG2E)
    if EDGE:
        grad = tl.where(cols == own, label_factor, grad)
    grad = (grad * slope * scale).to(row.dtype.element_ty)
    if EDGE:
        tl.store(row + cols, grad, mask=cols < V)
    else:
        tl.store(row + cols, grad)


@triton.jit
def _write_gradient(
    row, bias, lanes, own, num_inner, own_tile, num_tiles, V, scale, cap, largest, others_factor, label_factor,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The second pass, mostly from the L2 cache: logits become their gradient. Edges first: the other way round, a
    predicate is spilled for an odd vocabulary on sm_80.
    """
    for number in range(num_inner, num_tiles):
        cols = lanes + _start(number, num_inner, own_tile, V, BLOCK_V, True)
        _write_tile(row, bias, cols, own, V, scale, cap, largest, others_factor, label_factor, HAS_BIAS, HAS_CAP, True)
    for number in range(num_inner):
        cols = lanes + _start(number, num_inner, own_tile, V, BLOCK_V, False)
        _write_tile(row, bias, cols, own, V, scale, cap, largest, others_factor, label_factor, HAS_BIAS, HAS_CAP, False)


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=ROW_VECTORS)
def lce_rows_kernel(
    slab, stride, bias, own_C, coefficient_C, out, C, V, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STATS: tl.constexpr, GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of the slab: out[0..2] = nll, entropy, correct, and logits become their gradient."""
    i = tl.program_id(0)
    row = slab + i.to(tl.int64) * stride  # int64: C * V passes 2^31
    own = tl.load(own_C + i)
    label, _ = _logits(row, bias, own, V, scale, cap, HAS_BIAS, HAS_CAP, False)
    # A group of neighbours to a thread: [BLOCK_V / GROUP, GROUP].
    lanes = (tl.arange(0, BLOCK_V // GROUP) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    num_inner, own_tile, num_tiles = _tiles(own, V, BLOCK_V)
    top, exps, weighted = _sums(
        row, bias, lanes, own, num_inner, own_tile, num_tiles, V, scale, cap, HAS_BIAS, HAS_CAP, STATS, BLOCK_V
    )
    some = exps > 0
    log_sum = tl.where(exps != exps, exps, tl.log(tl.where(some, exps, 1.0)))  # NaN stays NaN
    largest = tl.where(some | (exps != exps), top, float("-inf"))
    margin = (largest - label) + log_sum  # in this order: the first difference is nearly exact
    nll, p, q = from_margin(tl.where(label < float("inf"), margin, float("nan")))  # overflowed, not certain
    tl.store(out + i, nll)
    if STATS:
        tl.store(out + C + i, entropy_of(nll, p, q, log_sum - weighted / tl.where(some, exps, 1.0)))
        tl.store(out + 2 * C + i, tl.where(largest <= label, 1.0, 0.0))
    if GRAD:
        factor = tl.load(coefficient_C + i) * q
        _write_gradient(
            row, bias, lanes, own, num_inner, own_tile, num_tiles, V, scale, cap, top,
            factor / tl.where(some, exps, 1.0), -factor, HAS_BIAS, HAS_CAP, BLOCK_V,
        )  # fmt: skip


def chunk(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, coefficient_C: torch.Tensor) -> Rows:
    """Loss of C rows; adds their share to the head's gradients, and fills rows.grad_hidden where it is wanted."""
    C, V = len(hidden_CD), len(head.unembed_VD)
    slab_CV = head.slab(C, ROW_ALIGNMENT)[:, :V]
    torch.mm(hidden_CD, head.unembed_VD.t(), out=slab_CV)
    out = torch.empty(3, C, dtype=torch.float32, device=hidden_CD.device)
    name, table = row_blocks(head.wants_stats, head.logit_softcap is not None)
    sizes = choose(name, table, hidden_CD.device, (V,))
    lce_rows_kernel[(C,)](
        slab_CV, slab_CV.stride(0), head.bias_V, labels_C, coefficient_C, out, C, V,
        head.logit_scale, head.logit_softcap or 1.0, HAS_BIAS=head.bias_V is not None,
        HAS_CAP=head.logit_softcap is not None, STATS=head.wants_stats, GRAD=head.wants_gradient, **sizes.launch,
    )  # fmt: skip
    rows = Rows(out[NLL])
    if head.wants_stats:
        rows.entropy, rows.correct = out[ENTROPY], out[CORRECT]
    if head.wants_gradient:
        rows.grad_hidden = head.backward(slab_CV, hidden_CD)
    return rows


def row_blocks(stats: bool, capped: bool) -> tuple[str, Table]:
    """Name and blocks of the row kernel for what it has to do."""
    return ("lce_rows_rich", RICH_ROW_BLOCKS) if stats or capped else ("lce_rows", ROW_BLOCKS)
