"""linear_cross_entropy anchored at the label: the logits are never stored, nor rounded.

    a    = logit of the label                          one dot product a row
    E[v] = exp(z[v] - a - 28), v not y                 the epilogue of a Triton matrix product, stored in 16 bits
    S    = sum of E;  X = S * exp(28) = exp(o - a)     per tile of the vocabulary, added up in a fixed order
    nll  = log(1 + X),  q = X / (1 + X),  p(v) = q * E[v] / S
    dhidden = c * q / S * (E @ unembed) + label_factor * unembed[y] - smoothing / V * sum of all rows of unembed

Because the anchor is known before the product, there is no maximum to look for, no second pass over the logits, and
all that differs between rows is a factor: weights, smoothing, z-loss and whatever comes from upstream. Because E leaves
out the label and keeps float32's exponents, the gradient of a nearly certain row is as exact as any other.

C rows of a chunk, D hidden, V vocabulary of this rank's slice. docs/kernels.md derives it and shows the figures.
"""

from dataclasses import replace
from typing import Any

import torch
import triton

from tunesmith.kernels.blocks import Build, Table, block, choose
from tunesmith.kernels.device import INTERPRETED, add_mm_fp32, arch, mm_fp32, num_multiprocessors
from tunesmith.kernels.lce.anchored_kernels import (
    lce_anchor_kernel,
    lce_gemm_kernel,
    lce_gemm_tma_kernel,
    lce_hidden_kernel,
    lce_rescue_kernel,
    lce_terms_kernel,
)
from tunesmith.kernels.lce.head import Head
from tunesmith.kernels.lce.rows import NO_LOGIT, Factors, LogitSums, Rows, whole_rows

SLAB_ALIGNMENT = 64  # elements: the copy engine addresses rows that start on 16 bytes
GEMM_BLOCKS = {
    90: [block(8, 3, BLOCK_C=128, BLOCK_V=256, BLOCK_D=64), block(8, 4, BLOCK_C=128, BLOCK_V=128, BLOCK_D=64)],
    80: [block(8, 3, BLOCK_C=128, BLOCK_V=256, BLOCK_D=32), block(8, 4, BLOCK_C=128, BLOCK_V=128, BLOCK_D=32)],
    0: [block(4, 1, BLOCK_C=16, BLOCK_V=64, BLOCK_D=32)],
}
# A soft cap and statistics need more registers in the epilogue than 256 columns leave.
CAPPED_BLOCKS = {
    90: [block(8, 4, BLOCK_C=128, BLOCK_V=128, BLOCK_D=64)],
    80: [block(8, 4, BLOCK_C=128, BLOCK_V=128, BLOCK_D=32)],
    0: [block(4, 1, BLOCK_C=16, BLOCK_V=32, BLOCK_D=32)],
}
STATS_BLOCKS = CAPPED_BLOCKS | {80: [block(8, 4, BLOCK_C=64, BLOCK_V=128, BLOCK_D=32)]}
ROW_BLOCK_D = 1024
ROWS_A_PROGRAM = 64
RESCUE_BLOCK_V, RESCUE_BLOCK_D = 64, 64
NLL, LOSS, E_FACTOR, LABEL_FACTOR, ENTROPY, CORRECT = range(6)  # rows of what lce_terms_kernel writes


def chunk(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, coefficient_C: torch.Tensor) -> Rows:
    """Loss of C rows; adds their share to the head's gradients, and fills rows.grad_hidden where it is wanted."""
    own_C = head.vocabulary.own(labels_C, len(head.unembed_VD))
    label_C, total_C = _anchors(head, hidden_CD, own_C)
    mine_C = label_C.clone() if head.vocabulary.group is not None else label_C
    head.vocabulary.sum(label_C)
    e_CV, sums, offset_C = _powers(head, hidden_CD, own_C, label_C)
    if head.vocabulary.group is None:
        rows, factors = _whole(head, label_C, total_C, sums, offset_C, coefficient_C)
    else:
        rows, factors = _joined(head, label_C, mine_C, total_C, sums, offset_C, coefficient_C)
    if e_CV is not None:
        _use(head, rows, factors, e_CV, hidden_CD, own_C, label_C)
    return rows


def _anchors(head: Head, hidden_CD: torch.Tensor, own_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's logit, and the sum of all logits where there is smoothing, [C] float32 each."""
    C, D = hidden_CD.shape
    label_C = torch.empty(C, dtype=torch.float32, device=hidden_CD.device)
    smoothed = head.terms.label_smoothing > 0
    total_C = torch.empty_like(label_C) if smoothed else label_C
    lce_anchor_kernel[(C,)](
        hidden_CD, head.unembed_VD, head.bias_V, head.token_sum() if smoothed else label_C, own_C, label_C, total_C, D,
        head.terms.logit_scale, head.terms.logit_softcap or 1.0, head.bias_sum() if smoothed else label_C,
        HAS_BIAS=head.bias_V is not None, HAS_CAP=head.terms.logit_softcap is not None, SMOOTHED=smoothed,
        BLOCK_D=_row_block(D), num_warps=4,
    )  # fmt: skip
    return label_C, total_C


def _row_block(D: int) -> int:
    return min(ROW_BLOCK_D, int(triton.next_power_of_2(D)))


def _powers(
    head: Head, hidden_CD: torch.Tensor, own_C: torch.Tensor, label_C: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """E, [C, V], where a gradient is wanted; sums of E and of E * (d - largest), and largest, [3, C]; offsets, [C]."""
    (C, D), V = hidden_CD.shape, len(head.unembed_VD)
    slab = head.slab(C, SLAB_ALIGNMENT) if head.wants_gradient else None
    by_copy_engine = copy_engine_fits(hidden_CD, head.unembed_VD)
    name, table = _table(head.wants_stats, head.terms.logit_softcap is not None)
    sizes = choose(name, table, hidden_CD.device, (D, V))
    tiles_V = triton.cdiv(V, sizes["BLOCK_V"])
    num_sums = 3 if head.wants_stats else 1
    partial = torch.empty(num_sums, C, tiles_V, dtype=torch.float32, device=hidden_CD.device)
    flags: dict[str, Any] = {
        "HAS_BIAS": head.bias_V is not None,
        "HAS_CAP": head.terms.logit_softcap is not None,
        "STORE": slab is not None,
        "STATS": head.wants_stats,
    }
    e_stride = slab.stride(0) if slab is not None else 0
    common = (C, V, D, e_stride, head.terms.logit_scale, head.terms.logit_softcap or 1.0)
    tiles = triton.cdiv(C, sizes["BLOCK_C"]) * tiles_V
    arguments = (hidden_CD, head.unembed_VD, head.bias_V, label_C, own_C, slab, partial, *common)
    if by_copy_engine:
        triton.set_allocator(_descriptor_memory)
        programs = min(tiles, num_multiprocessors(hidden_CD.device))
        lce_gemm_tma_kernel[(programs,)](*arguments, **flags, WIDEN=INTERPRETED, PROGRAMS=programs, **sizes.launch)
    else:
        lce_gemm_kernel[(tiles,)](*arguments, **flags, WIDEN=INTERPRETED, **sizes.launch)
    sums = partial[:1].sum(-1)  # in the order of the tiles: bitwise the same each time
    if head.wants_stats:
        top_C = partial[2].amax(-1)
        weighted_C = (partial[1] + partial[0] * (partial[2] - top_C[:, None])).sum(-1)
        sums = torch.cat([sums, weighted_C[None], top_C[None]])
    offset_C = torch.empty_like(label_C)
    lce_rescue_kernel[(C,)](
        hidden_CD, head.unembed_VD, head.bias_V, label_C, own_C, slab, sums, offset_C, *common, **flags,
        BLOCK_V=RESCUE_BLOCK_V, BLOCK_D=RESCUE_BLOCK_D, num_warps=4,
    )  # fmt: skip
    return (None if slab is None else slab[:, :V]), sums, offset_C


def _table(stats: bool, capped: bool) -> tuple[str, Table]:
    """Name and blocks of the product for what its epilogue has to do."""
    if stats:
        return "lce_gemm_stats", STATS_BLOCKS
    return ("lce_gemm_capped", CAPPED_BLOCKS) if capped else ("lce_gemm", GEMM_BLOCKS)


def copy_engine_fits(hidden_CD: torch.Tensor, unembed_VD: torch.Tensor) -> bool:
    """Whether Hopper's copy engine can address both: rows and starts on multiples of 16 bytes."""
    if hidden_CD.is_cuda and arch(hidden_CD.device) != 90:
        return False
    row_bytes = hidden_CD.shape[1] * hidden_CD.element_size()
    return row_bytes % 16 == 0 and hidden_CD.data_ptr() % 16 == 0 and unembed_VD.data_ptr() % 16 == 0


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where Triton writes the descriptors of the copy engine."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def _whole(
    head: Head,
    label_C: torch.Tensor,
    total_C: torch.Tensor,
    sums: torch.Tensor,
    offset_C: torch.Tensor,
    coefficient_C: torch.Tensor,
) -> tuple[Rows, Factors]:
    """Rows and factors, of which `others` is what E is multiplied with, in one launch."""
    C, terms = len(label_C), head.terms
    out = torch.empty(6, C, dtype=torch.float32, device=label_C.device)
    lce_terms_kernel[(triton.cdiv(C, ROWS_A_PROGRAM),)](
        label_C, total_C, sums, offset_C, coefficient_C, out, C, head.vocabulary.size, SMOOTHING=terms.label_smoothing,
        Z_LOSS=terms.z_loss, STATS=head.wants_stats, BLOCK_C=ROWS_A_PROGRAM, num_warps=2,
    )  # fmt: skip
    stats = (out[ENTROPY], out[CORRECT]) if head.wants_stats else (None, None)
    smoothing_C = coefficient_C * (terms.label_smoothing / head.vocabulary.size) if terms.label_smoothing else None
    return Rows(out[NLL], out[LOSS], *stats), Factors(out[E_FACTOR], out[LABEL_FACTOR], smoothing_C)


def _joined(
    head: Head,
    label_C: torch.Tensor,
    mine_C: torch.Tensor,
    total_C: torch.Tensor,
    sums: torch.Tensor,
    offset_C: torch.Tensor,
    coefficient_C: torch.Tensor,
) -> tuple[Rows, Factors]:
    """The same from every rank's sums; offsets may differ between ranks, so it is logsumexps that are joined."""
    log_sum_C = torch.where(sums[0] > 0, torch.log(sums[0]), 0)
    largest_C = torch.where(sums[0] > 0, label_C + offset_C, NO_LOGIT)  # what log_sum is relative to
    found = LogitSums(mine_C, largest_C, log_sum_C, total_C if head.terms.label_smoothing else None)
    if head.wants_stats:
        spread_C = torch.log(sums[0] * torch.exp(offset_C - sums[2])) - sums[1] / sums[0]
        found.others_entropy = torch.where(sums[0] > 0, spread_C, 0)
    rows, factors, everywhere = whole_rows(found, coefficient_C, head.terms, head.vocabulary)
    if head.wants_stats:
        rows.correct = head.vocabulary.sum((sums[2] > 0).float()) == 0
    margin_C = (everywhere.largest - label_C) + everywhere.log_sum
    return rows, replace(factors, others=factors.others * torch.exp(offset_C - margin_C))


def _use(
    head: Head,
    rows: Rows,
    factors: Factors,
    e_CV: torch.Tensor,
    hidden_CD: torch.Tensor,
    own_C: torch.Tensor,
    label_C: torch.Tensor,
) -> None:
    """The gradients of hidden states and head from E and the factors of its rows."""
    C, D = hidden_CD.shape
    cap, has_cap = head.terms.logit_softcap or 1.0, head.terms.logit_softcap is not None
    smoothing_C, e_factor_C = factors.smoothing, factors.others
    if head.wants_hidden:
        alone = head.vocabulary.group is None
        every_D, every_C = (head.token_sum(), smoothing_C) if smoothing_C is not None else (e_factor_C, e_factor_C)
        grad_CD = torch.empty_like(hidden_CD, dtype=hidden_CD.dtype if alone else torch.float32)
        lce_hidden_kernel[(C,)](
            mm_fp32(e_CV, head.unembed_VD), head.unembed_VD, every_D, own_C, label_C, e_factor_C,
            factors.label, every_C, grad_CD, D, head.terms.logit_scale, cap, HAS_CAP=has_cap,
            SMOOTHED=smoothing_C is not None, BLOCK_D=_row_block(D), num_warps=4,
        )  # fmt: skip
        rows.grad_hidden = head.vocabulary.sum(grad_CD)
    if head.grad_unembed is not None:
        scaled_CD = torch.empty_like(hidden_CD)
        torch.mul(hidden_CD, (e_factor_C * head.terms.logit_scale)[:, None], out=scaled_CD)
        add_mm_fp32(head.grad_unembed, e_CV.t(), scaled_CD, start=head.is_first)
        _add_labels(head, factors, hidden_CD, own_C, label_C)
        if smoothing_C is not None:
            head.take_from_every_token(mm_fp32(smoothing_C[None], hidden_CD.float())[0] * head.terms.logit_scale)


def _add_labels(
    head: Head, factors: Factors, hidden_CD: torch.Tensor, own_C: torch.Tensor, label_C: torch.Tensor
) -> None:
    """The labels' own share of the head's gradient, in float32: through the product it would be rounded to 16 bits
    twice, and it is the largest share (1.9 times the error of a rounded exact gradient, against 1.1).
    """
    assert head.grad_unembed is not None
    factor_C = torch.where(own_C >= 0, factors.label, 0) * head.terms.logit_scale
    if head.terms.logit_softcap is not None:
        factor_C = factor_C * (1 - (label_C / head.terms.logit_softcap).square())
    # Sorted on a GPU before they are added up, not by atomics as index_add_ does: bitwise the same each time.
    head.grad_unembed.index_put_((own_C.clamp(min=0),), hidden_CD * factor_C[:, None], accumulate=True)


def builds() -> list[Build]:
    """Every shipped configuration of these kernels, for the cross-compile report."""
    found = []
    for target in (80, 90):
        kernel, matrix, extra = (
            (lce_gemm_tma_kernel, ("HGMMA", "UTMALDG"), {"PROGRAMS": 132, "SPECIALIZE": False})
            if target == 90
            else (lce_gemm_kernel, ("HMMA", "LDGSTS"), {})
        )
        for label, flags in FEATURES.items():
            constants = flags | {"WIDEN": False} | extra
            found += [
                Build(kernel, sizes, target, GEMM_TYPES, constants, label, aligned=EVEN, expects=matrix)
                for sizes in _table(flags["STATS"], flags["HAS_CAP"])[1][target]
            ]
        found += _row_builds(target)
    return found


EVEN = "D", "V", "e_stride", "vocab_size"  # divisible by 16 at most launches, and then compiled for it
FEATURES: dict[str, dict[str, Any]] = {
    "train": {"HAS_BIAS": False, "HAS_CAP": False, "STORE": True, "STATS": False},
    "train, bias": {"HAS_BIAS": True, "HAS_CAP": False, "STORE": True, "STATS": False},
    "train, cap": {"HAS_BIAS": False, "HAS_CAP": True, "STORE": True, "STATS": False},
    "evaluate": {"HAS_BIAS": False, "HAS_CAP": False, "STORE": False, "STATS": True},
    "train, all options": {"HAS_BIAS": True, "HAS_CAP": True, "STORE": True, "STATS": True},
}
GEMM_TYPES = {"x": "*bf16", "w": "*bf16", "bias": "*fp32", "label_C": "*fp32", "own_C": "*i64", "e": "*bf16"}
GEMM_TYPES |= {
    "partial": "*fp32",
    "C": "i32",
    "V": "i32",
    "D": "i32",
    "e_stride": "i32",
    "scale": "fp32",
    "cap": "fp32",
}


def _row_builds(target: int) -> list[Build]:
    """The kernels that go by rows, which have one configuration each, with all options on."""
    numbers = {"C": "i32", "V": "i32", "D": "i32", "e_stride": "i32", "scale": "fp32", "cap": "fp32"}
    vectors = {f"{name}_C": "*fp32" for name in ("label", "total", "offset", "coefficient", "e_factor", "label_factor")}
    tensors = {"x": "*bf16", "w": "*bf16", "bias": "*fp32", "e": "*bf16", "sums": "*fp32", "out": "*fp32"}
    tensors |= {"token_sum": "*fp32", "products": "*fp32", "grad": "*bf16", "own_C": "*i64", "bias_sum": "*fp32"}
    types = numbers | vectors | tensors | {"smoothing_factor_C": "*fp32", "vocab_size": "i32"}
    options: dict[str, Any] = {"HAS_BIAS": True, "HAS_CAP": True, "SMOOTHED": True, "STORE": True, "STATS": True}
    options |= {"SMOOTHING": 0.1, "Z_LOSS": 1e-4}
    shapes = (
        (lce_anchor_kernel, block(4, 2, BLOCK_D=ROW_BLOCK_D)),
        (lce_rescue_kernel, block(4, 2, BLOCK_V=RESCUE_BLOCK_V, BLOCK_D=RESCUE_BLOCK_D)),
        (lce_terms_kernel, block(2, 2, BLOCK_C=ROWS_A_PROGRAM)),
        (lce_hidden_kernel, block(4, 2, BLOCK_D=ROW_BLOCK_D)),
    )
    return [Build(kernel, sizes, target, types, options, "all options", aligned=EVEN) for kernel, sizes in shapes]
