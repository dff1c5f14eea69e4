"""linear_cross_entropy by chunks: cuBLAS makes the logits, one Triton kernel a row turns them into their gradient in
place, cuBLAS makes the gradients of hidden states and head from that.

C rows of a chunk, D hidden, V vocabulary of this rank's slice. The slab of logits is [C, V] in the dtype of the hidden
states, so for 16-bit inputs the logits are rounded once; the anchored back end does not round them.
"""

import torch
import triton
import triton.language as tl

from tunesmith.kernels.blocks import Block, Build, block, choose
from tunesmith.kernels.device import add_mm_fp32, mm_fp32
from tunesmith.kernels.lce.head import Head
from tunesmith.kernels.lce.row_math import LOG2E, capped, entropy_of, from_margin, row_terms
from tunesmith.kernels.lce.rows import LogitSums, Rows, whole_rows

# A lane keeps its own maximum and sum: one reduction a row. Larger blocks with a scalar maximum spill (318 stores).
ROW_BLOCKS = {
    90: [block(8, 2, BLOCK_V=4096), block(8, 3, BLOCK_V=2048), block(4, 3, BLOCK_V=2048)],
    80: [block(8, 2, BLOCK_V=4096), block(8, 3, BLOCK_V=2048), block(4, 3, BLOCK_V=2048)],
    0: [block(4, 1, BLOCK_V=128)],
}
ROW_ALIGNMENT = 64  # elements: rows of the slab start on 128 bytes, also for an odd vocabulary
LOWEST = tl.constexpr(-1.0e38)  # below every logit, and finite: the difference of two of them is 0, not NaN

NLL, LOSS, ENTROPY, CORRECT, LABEL, LARGEST, LOG_SUM, TOTAL, OTHERS_ENTROPY = range(9)  # rows of `out`


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
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTHED: tl.constexpr, STATS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One pass over a row: the label's logit, and of the others the maximum, the sum of e = exp(logit - maximum) and of
    e * (logit - maximum); and the sum of all.
    """
    lanes = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    exps = tl.zeros((BLOCK_V,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    label = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        z, _ = _logits(row, bias, cols, V, scale, cap, HAS_BIAS, HAS_CAP)
        inside = cols < V
        other = inside & (cols != own)
        label += tl.where(inside & (cols == own), z, 0.0)
        if SMOOTHED:
            total += tl.where(inside, z, 0.0)
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
    return tl.sum(label, 0), top, tl.sum(exps * lift, 0), tl.sum(weighted, 0), tl.sum(total, 0)


@triton.jit
def _write_gradient(
    row, bias, own, V, scale, cap, largest, others_factor, label_factor, smoothing_factor,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The second pass, mostly from the L2 cache: logits become their gradient."""
    lanes = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        z, slope = _logits(row, bias, cols, V, scale, cap, HAS_BIAS, HAS_CAP)
        grad = others_factor * tl.exp2(tl.where((cols < V) & (cols != own), z - largest, 0.0) * LOG2E)
        grad = (tl.where(cols == own, label_factor, grad) - smoothing_factor) * slope * scale
        tl.store(row + cols, grad.to(row.dtype.element_ty), mask=cols < V)


@triton.jit
def lce_rows_kernel(
    slab, stride, bias, own_C, coefficient_C, out, C, V, scale, cap, vocab_size,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    STATS: tl.constexpr, GRAD: tl.constexpr, WHOLE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of the slab. WHOLE: this slice is the whole vocabulary, so that the loss and the gradient follow at once;
    else only the sums are written, for whole_rows() to join.
    """
    i = tl.program_id(0)
    row = slab + i.to(tl.int64) * stride  # int64: C * V passes 2^31
    own = tl.load(own_C + i)
    label, top, exps, weighted, total = _sums(
        row, bias, own, V, scale, cap, HAS_BIAS, HAS_CAP, SMOOTHING > 0, STATS, BLOCK_V
    )
    some = exps > 0
    log_sum = tl.where(exps != exps, exps, tl.log(tl.where(some, exps, 1.0)))  # NaN stays NaN
    largest = tl.where(some | (exps != exps), top, float("-inf"))
    if WHOLE:
        margin = (largest - label) + log_sum  # in this order: the first difference is nearly exact
        nll, p, q = from_margin(tl.where(label < float("inf"), margin, float("nan")))  # overflowed, not certain
        loss, others_factor, label_factor = row_terms(
            label, nll, p, q, total / vocab_size, tl.load(coefficient_C + i), SMOOTHING, Z_LOSS
        )
        tl.store(out + i, nll)
        tl.store(out + C + i, loss)
        if STATS:
            tl.store(out + 2 * C + i, entropy_of(nll, p, q, log_sum - weighted / tl.where(some, exps, 1.0)))
            tl.store(out + 3 * C + i, tl.where(largest <= label, 1.0, 0.0))
        if GRAD:
            smoothing_factor = tl.load(coefficient_C + i) * (SMOOTHING / vocab_size)
            _write_gradient(
                row, bias, own, V, scale, cap, top, others_factor / tl.where(some, exps, 1.0), label_factor,
                smoothing_factor, HAS_BIAS, HAS_CAP, BLOCK_V,
            )  # fmt: skip
    else:
        tl.store(out + 4 * C + i, label)
        tl.store(out + 5 * C + i, largest)
        tl.store(out + 6 * C + i, log_sum)
        tl.store(out + 7 * C + i, total)
        tl.store(out + 8 * C + i, log_sum - weighted / tl.where(some, exps, 1.0))


@triton.jit
def lce_gradient_kernel(
    slab, stride, bias, own_C, largest_C, others_factor_C, label_factor_C, smoothing_factor_C, V, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of a slice of the vocabulary, once the sums over all slices are known."""
    i = tl.program_id(0)
    smoothing_factor = tl.load(smoothing_factor_C + i) if SMOOTHED else 0.0
    _write_gradient(
        slab + i.to(tl.int64) * stride, bias, tl.load(own_C + i), V, scale, cap, tl.load(largest_C + i),
        tl.load(others_factor_C + i), tl.load(label_factor_C + i), smoothing_factor, HAS_BIAS, HAS_CAP, BLOCK_V,
    )  # fmt: skip


def chunk(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, coefficient_C: torch.Tensor) -> Rows:
    """Loss of C rows; adds their share to the head's gradients, and fills rows.grad_hidden where it is wanted."""
    C, V = len(hidden_CD), len(head.unembed_VD)
    slab_CV = head.slab(C, ROW_ALIGNMENT)[:, :V]
    torch.mm(hidden_CD, head.unembed_VD.t(), out=slab_CV)
    own_C = head.vocabulary.own(labels_C, V)
    whole = head.vocabulary.group is None
    out = torch.empty(9, C, dtype=torch.float32, device=hidden_CD.device)
    terms = head.terms
    sizes = choose("lce_rows", ROW_BLOCKS, hidden_CD.device, (V,))
    lce_rows_kernel[(C,)](
        slab_CV, slab_CV.stride(0), head.bias_V, own_C, coefficient_C, out, C, V,
        terms.logit_scale, terms.logit_softcap or 1.0, head.vocabulary.size,
        HAS_BIAS=head.bias_V is not None, HAS_CAP=terms.logit_softcap is not None, SMOOTHING=terms.label_smoothing,
        Z_LOSS=terms.z_loss, STATS=head.wants_stats, GRAD=head.wants_gradient, WHOLE=whole, **sizes.launch,
    )  # fmt: skip
    rows = _rows(out, head.wants_stats) if whole else _joined_rows(head, slab_CV, own_C, coefficient_C, out, sizes)
    if head.wants_gradient:
        _use(head, rows, slab_CV, hidden_CD)
    return rows


def _rows(out: torch.Tensor, wants_stats: bool) -> Rows:
    return Rows(
        nll=out[NLL],
        loss=out[LOSS],
        entropy=out[ENTROPY] if wants_stats else None,
        correct=out[CORRECT] if wants_stats else None,
    )


def _joined_rows(
    head: Head,
    slab_CV: torch.Tensor,
    own_C: torch.Tensor,
    coefficient_C: torch.Tensor,
    out: torch.Tensor,
    sizes: Block,
) -> Rows:
    """Joins the sums of all ranks, then turns this rank's slab into its gradient."""
    terms = head.terms
    total_C = out[TOTAL] if terms.label_smoothing else None
    sums = LogitSums(out[LABEL], out[LARGEST], out[LOG_SUM], total_C, out[OTHERS_ENTROPY] if head.wants_stats else None)
    rows, factors, everywhere = whole_rows(sums, coefficient_C, terms, head.vocabulary)
    if head.wants_gradient:
        lce_gradient_kernel[(len(own_C),)](
            slab_CV, slab_CV.stride(0), head.bias_V, own_C, everywhere.largest,
            factors.others * torch.exp(-everywhere.log_sum), factors.label, factors.smoothing, slab_CV.shape[1],
            terms.logit_scale,
            terms.logit_softcap or 1.0, HAS_BIAS=head.bias_V is not None, HAS_CAP=terms.logit_softcap is not None,
            SMOOTHED=terms.label_smoothing > 0, **sizes.launch,
        )  # fmt: skip
    return rows


def _use(head: Head, rows: Rows, grad_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """The three gradients from that of the logits."""
    if head.wants_hidden:
        rows.grad_hidden = head.vocabulary.sum(mm_fp32(grad_CV, head.unembed_VD))
    if head.grad_unembed is not None:
        add_mm_fp32(head.grad_unembed, grad_CV.t(), hidden_CD, start=head.is_first)
    if head.grad_bias is not None:
        head.grad_bias += grad_CV.sum(0, dtype=head.grad_bias.dtype)


# What Triton finds divisible by 16 at a launch, and loads in vectors: with most vocabularies, and with GPT-2's 50,257.
EVEN, ODD = ("stride", "V", "vocab_size"), ("stride",)


def builds() -> list[Build]:
    """Every shipped configuration of both kernels, for the cross-compile report."""
    pointers = {"slab": "*bf16", "bias": "*fp32", "own_C": "*i64", "coefficient_C": "*fp32", "out": "*fp32"}
    numbers = {"stride": "i64", "C": "i32", "V": "i32", "scale": "fp32", "cap": "fp32", "vocab_size": "i32"}
    plain = {"HAS_BIAS": False, "HAS_CAP": False, "SMOOTHING": 0.0, "Z_LOSS": 0.0, "STATS": False}
    rich = {"HAS_BIAS": True, "HAS_CAP": True, "SMOOTHING": 0.1, "Z_LOSS": 1e-4, "STATS": True}
    apart = {f"{name}_C": "*fp32" for name in ("largest", "others_factor", "label_factor", "smoothing_factor")}
    found = []
    for arch in (80, 90):
        for sizes in ROW_BLOCKS[arch]:
            for label, features in (("plain", plain), ("all options", rich)):
                for whole in (True, False) if label == "all options" else (True,):
                    constants = {**features, "GRAD": True, "WHOLE": whole}
                    where = "" if whole else ", slice"
                    types, name = pointers | numbers, f"{label}{where}"
                    found.append(Build(lce_rows_kernel, sizes, arch, types, constants, name, aligned=EVEN))
                    if sizes is ROW_BLOCKS[arch][0]:
                        found.append(Build(lce_rows_kernel, sizes, arch, types, constants, f"{name}, odd V", ODD))
            grad = {name: pointers[name] for name in ("slab", "bias", "own_C")} | apart
            grad |= {name: numbers[name] for name in ("stride", "V", "scale", "cap")}
            constants = {"HAS_BIAS": True, "HAS_CAP": True, "SMOOTHED": True}
            found.append(Build(lce_gradient_kernel, sizes, arch, grad, constants, "all options, slice", aligned=EVEN))
    return found
