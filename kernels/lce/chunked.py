"""linear_cross_entropy by chunks: cuBLAS makes the logits, one Triton kernel a row turns them into their gradient in
place, cuBLAS makes the gradients of hidden states and head from that.

C rows of a chunk, D hidden, V vocabulary. The slab of logits is [C, V] in the dtype of the hidden
states, so for 16-bit inputs the logits are rounded once; the anchored back end does not round them.
"""

import torch
import triton
import triton.language as tl

from tunesmith.kernels.blocks import block, choose
from tunesmith.kernels.lce.head import Head, Rows
from tunesmith.kernels.lce.row_math import LOG2E, capped, entropy_of, from_margin

# A lane keeps its own maximum and sum: one reduction a row. Larger blocks with a scalar maximum spill (318 stores).
ROW_BLOCKS = {
    90: [block(8, 2, BLOCK_V=4096), block(8, 3, BLOCK_V=2048), block(4, 3, BLOCK_V=2048)],
    80: [block(8, 2, BLOCK_V=4096), block(8, 3, BLOCK_V=2048), block(4, 3, BLOCK_V=2048)],
    0: [block(4, 1, BLOCK_V=128)],
}
ROW_ALIGNMENT = 64  # elements: rows of the slab start on 128 bytes, also for an odd vocabulary
LOWEST = tl.constexpr(-1.0e38)  # below every logit, and finite: the difference of two of them is 0, not NaN

NLL, ENTROPY, CORRECT = range(3)  # rows of `out`


@triton.jit
def _logits(row, bias, cols, V, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """softcap(scale * (h . w + b)) at some columns, and the slope; LOWEST past the end."""
    z = tl.load(row + cols, mask=cols < V, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=cols < V, other=0.0)
    z *= scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_CAP:
        z, slope = capped(z, cap)
    return z, slope


@triton.jit
def _sums(
    row, bias, own, V, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STATS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One pass over a row: the label's logit, and of the others the maximum, the sum of e = exp(logit - maximum) and of
    e * (logit - maximum).
    """
    lanes = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), LOWEST, tl.float32)
    exps = tl.zeros((BLOCK_V,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    label = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        z, _ = _logits(row, bias, cols, V, scale, cap, HAS_BIAS, HAS_CAP)
        inside = cols < V
        other = inside & (cols != own)
        label += tl.where(inside & (cols == own), z, 0.0)
        z = tl.where(other, z, LOWEST)
        higher = tl.where(z > largest, z, largest)  # NaN is never the largest, on a GPU as in the interpreter
        shrink = tl.exp2((largest - higher) * LOG2E)
        e = tl.where(other, tl.exp2((z - higher) * LOG2E), 0.0)
        if STATS:
            weighted = (weighted + exps * (largest - higher)) * shrink + e * tl.where(e > 0, z - higher, 0.0)
        exps = exps * shrink + e
        largest = higher
    top = tl.max(largest, 0)
    lift = tl.exp2((largest - top) * LOG2E)
    weighted = (weighted + exps * (largest - top)) * lift
    return tl.sum(label, 0), top, tl.sum(exps * lift, 0), tl.sum(weighted, 0)


@triton.jit
def _write_gradient(
    row, bias, own, V, scale, cap, largest, others_factor, label_factor,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The second pass, mostly from the L2 cache: logits become their gradient."""
    lanes = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        z, slope = _logits(row, bias, cols, V, scale, cap, HAS_BIAS, HAS_CAP)
        grad = others_factor * tl.exp2(tl.where((cols < V) & (cols != own), z - largest, 0.0) * LOG2E)
        grad = tl.where(cols == own, label_factor, grad) * slope * scale
        tl.store(row + cols, grad.to(row.dtype.element_ty), mask=cols < V)


@triton.jit
def lce_rows_kernel(
    slab, stride, bias, own_C, coefficient_C, out, C, V, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STATS: tl.constexpr, GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of the slab: out[0..2] = nll, entropy, correct, and logits become their gradient."""
    i = tl.program_id(0)
    row = slab + i.to(tl.int64) * stride  # int64: C * V passes 2^31
    own = tl.load(own_C + i)
    label, top, exps, weighted = _sums(row, bias, own, V, scale, cap, HAS_BIAS, HAS_CAP, STATS, BLOCK_V)
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
            row, bias, own, V, scale, cap, top, factor / tl.where(some, exps, 1.0), -factor, HAS_BIAS, HAS_CAP, BLOCK_V
        )


def chunk(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, coefficient_C: torch.Tensor) -> Rows:
    """Loss of C rows; adds their share to the head's gradients, and fills rows.grad_hidden where it is wanted."""
    C, V = len(hidden_CD), len(head.unembed_VD)
    slab_CV = head.slab(C, ROW_ALIGNMENT)[:, :V]
    torch.mm(hidden_CD, head.unembed_VD.t(), out=slab_CV)
    out = torch.empty(3, C, dtype=torch.float32, device=hidden_CD.device)
    sizes = choose("lce_rows", ROW_BLOCKS, hidden_CD.device, (V,))
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
