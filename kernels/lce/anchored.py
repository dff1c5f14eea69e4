"""linear_cross_entropy anchored at the label: the logits are never stored, nor rounded.

    a    = logit of the label                          one dot product a row
    E[v] = exp(z[v] - a - 28), v not y                 the epilogue of a Triton matrix product, stored in 16 bits
    S    = sum of E;  X = S * exp(28) = exp(o - a)     per tile of the vocabulary, added up in a fixed order
    nll  = log(1 + X),  q = X / (1 + X),  p(v) = q * E[v] / S
    dhidden = weight * q * ((E @ unembed) / S - unembed[y])

Because the anchor is known before the product, there is no maximum to look for, no second pass over the logits, and
all that differs between rows is a factor: weights and whatever comes from upstream. Because E leaves out the label and
keeps float32's exponents, the gradient of a nearly certain row is as exact as any other.

C rows of a chunk, D hidden, V vocabulary. docs/kernels.md derives it and shows the figures.
"""

import torch
import triton

from tunesmith.kernels.blocks import Table, block, choose, even
from tunesmith.kernels.device import INTERPRETED, add_mm_fp32, arch, mm_fp32, num_multiprocessors
from tunesmith.kernels.lce.anchored_kernels import (
    lce_anchor_kernel,
    lce_gemm_kernel,
    lce_gemm_tma_kernel,
    lce_hidden_kernel,
    lce_terms_kernel,
)
from tunesmith.kernels.lce.head import Head, Rows
from tunesmith.kernels.lce.rescue import rescue

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
# Without vectors and asynchronous copies, each element that is loaded takes registers.
ODD_BLOCKS = CAPPED_BLOCKS | {key: [block(8, 2, BLOCK_C=64, BLOCK_V=64, BLOCK_D=32)] for key in (90, 80)}
ROW_BLOCK_D = 1024
ROWS_A_PROGRAM = 64
NLL, E_FACTOR, LABEL_FACTOR, ENTROPY, CORRECT = range(5)  # rows of what lce_terms_kernel writes


def chunk(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, coefficient_C: torch.Tensor) -> Rows:
    """Loss of C rows; adds their share to the head's gradients, and fills rows.grad_hidden where it is wanted."""
    label_C = label_logits(head, hidden_CD, labels_C)
    e_CV, sums, offset_C = powers(head, hidden_CD, labels_C, label_C)
    out = torch.empty(5, len(labels_C), dtype=torch.float32, device=hidden_CD.device)
    lce_terms_kernel[(triton.cdiv(len(labels_C), ROWS_A_PROGRAM),)](
        label_C, sums, offset_C, coefficient_C, out, len(labels_C), STATS=head.wants_stats, BLOCK_C=ROWS_A_PROGRAM,
        num_warps=2,
    )  # fmt: skip
    rows = Rows(out[NLL])
    if head.wants_stats:
        rows.entropy, rows.correct = out[ENTROPY], out[CORRECT]
    if e_CV is not None and head.wants_hidden:
        rows.grad_hidden = _grad_hidden(head, e_CV, hidden_CD, labels_C, label_C, out)
    if e_CV is not None and head.grad_unembed is not None:
        scaled_CD = torch.empty_like(hidden_CD)
        torch.mul(hidden_CD, (out[E_FACTOR] * head.logit_scale)[:, None], out=scaled_CD)
        add_mm_fp32(head.grad_unembed, e_CV.t(), scaled_CD, start=head.is_first)
        _add_labels(head.grad_unembed, head, out[LABEL_FACTOR], hidden_CD, labels_C, label_C)
    return rows


def label_logits(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    """The label's logit, [C] float32."""
    C, D = hidden_CD.shape
    label_C = torch.empty(C, dtype=torch.float32, device=hidden_CD.device)
    lce_anchor_kernel[(C,)](
        hidden_CD, head.unembed_VD, head.bias_V, labels_C, label_C, D, head.logit_scale, head.logit_softcap or 1.0,
        HAS_BIAS=head.bias_V is not None, HAS_CAP=head.logit_softcap is not None, BLOCK_D=_row_block(D), num_warps=4,
    )  # fmt: skip
    return label_C


def _row_block(D: int) -> int:
    return min(ROW_BLOCK_D, int(triton.next_power_of_2(D)))


def powers(
    head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, label_C: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """E, [C, V], where a gradient is wanted; sums of E and of E * (d - largest), and largest, [3, C]; offsets, [C]."""
    (C, D), V = hidden_CD.shape, len(head.unembed_VD)
    slab = head.slab(C, SLAB_ALIGNMENT) if head.wants_gradient else None
    by_copy_engine = copy_engine_fits(hidden_CD, head.unembed_VD)
    vectors = by_copy_engine or (arch(hidden_CD.device) != 90 and even(D, hidden_CD, head.unembed_VD))
    name, table = product_blocks(head.wants_stats, head.logit_softcap is not None, vectors)
    sizes = choose(name, table, hidden_CD.device, (D, V))
    tiles_V = triton.cdiv(V, sizes["BLOCK_V"])
    num_sums = 3 if head.wants_stats else 1
    partial = torch.empty(num_sums, C, tiles_V, dtype=torch.float32, device=hidden_CD.device)
    flags: dict[str, bool] = {
        "HAS_BIAS": head.bias_V is not None,
        "HAS_CAP": head.logit_softcap is not None,
        "STORE": slab is not None,
        "STATS": head.wants_stats,
    }
    e_stride = slab.stride(0) if slab is not None else 0
    numbers = (C, V, D, e_stride, head.logit_scale, head.logit_softcap or 1.0)
    tiles = triton.cdiv(C, sizes["BLOCK_C"]) * tiles_V
    tensors = (hidden_CD, head.unembed_VD, head.bias_V, label_C, labels_C, slab)
    arguments = (*tensors, partial, *numbers)
    if by_copy_engine:
        triton.set_allocator(_descriptor_memory)
        most = num_multiprocessors(hidden_CD.device)
        lce_gemm_tma_kernel[(min(tiles, most),)](*arguments, **flags, WIDEN=INTERPRETED, PROGRAMS=most, **sizes.launch)
    else:
        lce_gemm_kernel[(tiles,)](*arguments, **flags, WIDEN=INTERPRETED, **sizes.launch)
    offset_C = rescue(tensors, partial, partial[0].sum(-1), numbers, flags, sizes)
    return (None if slab is None else slab[:, :V]), _sums(partial), offset_C


def _sums(partial: torch.Tensor) -> torch.Tensor:
    """The sums over tiles, in their order: bitwise the same each time. The second is about the largest of all."""
    sums = partial[:1].sum(-1)
    if len(partial) == 1:
        return sums
    top_C = partial[2].amax(-1)
    weighted_C = (partial[1] + partial[0] * (partial[2] - top_C[:, None])).sum(-1)
    return torch.cat([sums, weighted_C[None], top_C[None]])


def product_blocks(stats: bool, capped: bool, vectors: bool) -> tuple[str, Table]:
    """Name and blocks of the product for what its epilogue has to do, and whether it can load vectors."""
    if not vectors:
        return "lce_gemm_odd", ODD_BLOCKS
    if stats:
        return "lce_gemm_stats", STATS_BLOCKS
    return ("lce_gemm_capped", CAPPED_BLOCKS) if capped else ("lce_gemm", GEMM_BLOCKS)


def copy_engine_fits(hidden_CD: torch.Tensor, unembed_VD: torch.Tensor) -> bool:
    """Whether Hopper's copy engine can address both: rows and starts on multiples of 16 bytes."""
    if arch(hidden_CD.device) == 80:
        return False
    row_bytes = hidden_CD.shape[1] * hidden_CD.element_size()
    return row_bytes % 16 == 0 and hidden_CD.data_ptr() % 16 == 0 and unembed_VD.data_ptr() % 16 == 0


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where Triton writes the descriptors of the copy engine."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def _grad_hidden(
    head: Head,
    e_CV: torch.Tensor,
    hidden_CD: torch.Tensor,
    labels_C: torch.Tensor,
    label_C: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the hidden states, [C, D] in their dtype, from E and the factors of its rows."""
    C, D = hidden_CD.shape
    grad_CD = torch.empty_like(hidden_CD)
    lce_hidden_kernel[(C,)](
        mm_fp32(e_CV, head.unembed_VD), head.unembed_VD, labels_C, label_C, factors[E_FACTOR], factors[LABEL_FACTOR],
        grad_CD, D, head.logit_scale, head.logit_softcap or 1.0, HAS_CAP=head.logit_softcap is not None,
        BLOCK_D=_row_block(D), num_warps=4,
    )  # fmt: skip
    return grad_CD


def _add_labels(
    grad_VD: torch.Tensor,
    head: Head,
    factor_C: torch.Tensor,
    hidden_CD: torch.Tensor,
    labels_C: torch.Tensor,
    label_C: torch.Tensor,
) -> None:
    """The labels' own share of the head's gradient, in float32: through the product it would be rounded to 16 bits
    twice, and it is the largest share (1.9 times the error of a rounded exact gradient, against 1.1).
    """
    factor_C = factor_C * head.logit_scale
    if head.logit_softcap is not None:
        factor_C = factor_C * (1 - (label_C / head.logit_softcap).square())
    # Sorted on a GPU before they are added up, not by atomics as index_add_ does: bitwise the same each time.
    grad_VD.index_put_((labels_C,), hidden_CD * factor_C[:, None], accumulate=True)
