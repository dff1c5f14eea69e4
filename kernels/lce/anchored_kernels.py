"""Triton kernels of the target-anchored loss (anchored.py says what they are for).

C rows of a chunk, D hidden, V vocabulary; own: the token that is a row's label. The distance of a logit is d = z - a,
from the label's logit. What is stored is E = exp(d - offset), with the offset OFFSET for every row but the few that
rescue.py does again.
"""

import math

import triton
import triton.language as tl

from tunesmith.kernels.lce.row_math import LOG2E, ROW_VECTORS, ROWS, capped, entropy_of, log1p

# E is a factor away from exp(z - a), which costs bfloat16 no precision: it has the exponents of float32. With 28 nats,
# logits down to 59 nats below the label's have normal numbers, and labels of up to 69 nats need no second look.
OFFSET = tl.constexpr(28.0)
EXP_OFFSET = tl.constexpr(math.exp(28.0))
LARGEST = tl.constexpr(60.0)  # log2 of E at most; a row whose sum reaches it is done again
LOWEST = tl.constexpr(-1.0e38)


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=ROW_VECTORS)
def lce_anchor_kernel(
    x, w, bias, own_C, label_C, D, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row: the logit of its label."""
    i = tl.program_id(0).to(tl.int64)
    own = tl.load(own_C + i)
    lanes = tl.arange(0, BLOCK_D)
    label = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + lanes
        h = tl.load(x + i * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        label += h * tl.load(w + own * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    a = tl.sum(label, 0)
    if HAS_BIAS:
        a += tl.load(bias + own)
    a *= scale
    if HAS_CAP:
        a, _ = capped(a, cap)
    tl.store(label_C + i, a)


@triton.jit
def product(
    x, w, rows, cols, C, V, D, WIDEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows of hidden times rows of unembed, [BLOCK_C, BLOCK_V], with plain loads."""
    lanes = tl.arange(0, BLOCK_D)
    x_rows = x + rows.to(tl.int64)[:, None] * D
    w_rows = w + cols.to(tl.int64)[:, None] * D
    acc = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        at = start + lanes[None, :]
        a = tl.load(x_rows + at, mask=(rows[:, None] < C) & (at < D), other=0.0)
        b = tl.load(w_rows + at, mask=(cols[:, None] < V) & (at < D), other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def distances(
    acc, rows, cols, bias, label_C, own_C, C, V, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):  # fmt: skip
    """Distances of a tile of products, the slope of the cap, and which count: not the label, nothing outside."""
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < V, other=0.0)[None, :]
    z = acc * scale
    slope = 1.0
    if HAS_CAP:
        z, slope = capped(z, cap)
    a = tl.load(label_C + rows, mask=rows < C, other=0.0)
    own = tl.load(own_C + rows, mask=rows < C, other=-1)
    keep = (cols[None, :] < V) & (cols[None, :] != own[:, None])
    return z - a[:, None], slope, keep


@triton.jit
def finish_tile(
    acc, rows, cols, tile, num_tiles, bias, label_C, own_C, partial, C, V, scale, cap, offset, inside,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """E of a tile times the slope of the cap; partial[0..2, row, tile] = sums of E and E * (d - top), and top, of the
    rows that are inside.
    """
    d, slope, keep = distances(acc, rows, cols, bias, label_C, own_C, C, V, scale, cap, HAS_BIAS, HAS_CAP)
    e = tl.where(keep, tl.exp2(tl.minimum((d - offset) * LOG2E, LARGEST)), 0.0)
    place = partial + rows.to(tl.int64) * num_tiles + tile
    tl.store(place, tl.sum(e, 1), mask=inside)
    if STATS:
        plane = C.to(tl.int64) * num_tiles
        top = tl.maximum(tl.max(tl.where(keep, d, LOWEST), 1), LOWEST)
        tl.store(place + plane, tl.sum(e * tl.where(e > 0, d - top[:, None], 0.0), 1), mask=inside)
        tl.store(place + 2 * plane, top, mask=inside)
    return e * slope


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=ROW_VECTORS)
def lce_gemm_tma_kernel(
    x, w, bias, label_C, own_C, e, partial, C, V, D, e_stride, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STORE: tl.constexpr, STATS: tl.constexpr, WIDEN: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """E = exp(d - OFFSET) of hidden [C, D] times unembed [V, D], persistent, loads and stores by the copy engine.

    Tiles of one strip of the vocabulary follow each other, so that unembed is read from memory once. SPECIALIZE gives
    loads and products to different warps (with num_warps=4); bench/gpu_probe.py times it, and no table ships it:
    https://github.com/triton-lang/triton/issues/8311 gave wrong results.
    """
    x_tiles = tl.make_tensor_descriptor(x, [C, D], [D, 1], [BLOCK_C, BLOCK_D])
    w_tiles = tl.make_tensor_descriptor(w, [V, D], [D, 1], [BLOCK_V, BLOCK_D])
    if STORE:
        e_tiles = tl.make_tensor_descriptor(e, [C, e_stride], [e_stride, 1], [BLOCK_C, BLOCK_V])
    tiles_C, tiles_V = tl.cdiv(C, BLOCK_C), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_C * tiles_V, PROGRAMS, warp_specialize=SPECIALIZE):
        at_C, at_V = (tile % tiles_C) * BLOCK_C, (tile // tiles_C) * BLOCK_V
        acc = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
        for at_D in range(0, D, BLOCK_D):
            a = x_tiles.load([at_C, at_D])
            b = w_tiles.load([at_V, at_D])
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        rows, cols = at_C + tl.arange(0, BLOCK_C), at_V + tl.arange(0, BLOCK_V)
        powers = finish_tile(
            acc, rows, cols, tile // tiles_C, tiles_V, bias, label_C, own_C, partial, C, V, scale, cap,
            OFFSET, rows < C, HAS_BIAS, HAS_CAP, STATS,
        )  # fmt: skip
        if STORE:
            e_tiles.store([at_C, at_V], powers.to(e.dtype.element_ty))


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=ROW_VECTORS)
def lce_gemm_kernel(
    x, w, bias, label_C, own_C, e, partial, C, V, D, e_stride, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STORE: tl.constexpr, STATS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same with plain loads: for Ampere, and for rows that the copy engine cannot address."""
    tiles_C, tiles_V = tl.cdiv(C, BLOCK_C), tl.cdiv(V, BLOCK_V)
    tile = tl.program_id(0) // tiles_C
    rows = (tl.program_id(0) % tiles_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = product(x, w, rows, cols, C, V, D, WIDEN, BLOCK_C, BLOCK_V, BLOCK_D)
    powers = finish_tile(
        acc, rows, cols, tile, tiles_V, bias, label_C, own_C, partial, C, V, scale, cap, OFFSET, rows < C,
        HAS_BIAS, HAS_CAP, STATS,
    )  # fmt: skip
    if STORE:
        place = e + rows.to(tl.int64)[:, None] * e_stride + cols[None, :]
        tl.store(place, powers.to(e.dtype.element_ty), mask=(rows[:, None] < C) & (cols[None, :] < e_stride))


@triton.jit
def _others_entropy(s, weighted, top):
    """Entropy of the others from S, the sum of E * (d - largest), and the largest log of E, all in nats."""
    some = s > 0
    spread = tl.log(tl.where(some, s * tl.exp(tl.where(some, -top, 0.0)), 1.0))
    return spread - weighted / tl.where(some, s, 1.0)


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=ROW_VECTORS)
def lce_terms_kernel(
    label_C, sums, offset_C, coefficient_C, out, C, STATS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Loss and factors of rows: out[0..4] = nll, e_factor, label_factor, entropy, correct.

    With X = exp(o - a) = S * exp(offset): nll = log(1 + X), q = X / (1 + X), and exp(z[v] - o) = E[v] / S.
    """
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = i < C
    s = tl.load(sums + i, mask=inside, other=0.0)
    offset = tl.load(offset_C + i, mask=inside, other=0.0)
    rescued = offset != OFFSET
    X = s * EXP_OFFSET
    # A rescued row has X beyond float32, and p below exp(-69): log(1 + X) is log(X).
    nll = tl.where(rescued, offset + tl.log(tl.where(rescued & inside, s, 1.0)), log1p(X))
    p = tl.where(rescued, 0.0, 1 / (1 + X))
    q = tl.where(rescued, 1.0, X / (1 + X))
    label = tl.load(label_C + i, mask=inside, other=0.0)
    nll = tl.where(label < float("inf"), nll, float("nan"))  # overflowed, not certain
    factor = tl.load(coefficient_C + i, mask=inside, other=0.0) * q
    tl.store(out + i, nll, mask=inside)
    tl.store(out + C + i, factor / tl.where(s > 0, s, 1.0), mask=inside)
    tl.store(out + 2 * C + i, -factor, mask=inside)
    if STATS:
        largest = tl.load(sums + 2 * C + i, mask=inside, other=0.0)
        others_entropy = _others_entropy(s, tl.load(sums + C + i, mask=inside, other=0.0), largest - offset)
        tl.store(out + 3 * C + i, entropy_of(nll, p, q, others_entropy), mask=inside)
        tl.store(out + 4 * C + i, tl.where(largest <= 0, 1.0, 0.0), mask=inside)


@triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=ROW_VECTORS)
def lce_hidden_kernel(
    products, w, own_C, label_C, e_factor_C, label_factor_C, grad, D, scale, cap,
    HAS_CAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of one hidden state from the row of E @ unembed and the label's row of unembed."""
    i = tl.program_id(0).to(tl.int64)
    own = tl.load(own_C + i)
    e_factor, label_factor = tl.load(e_factor_C + i), tl.load(label_factor_C + i)
    if HAS_CAP:
        tanh = tl.load(label_C + i) / cap
        label_factor *= 1 - tanh * tanh
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        g = e_factor * tl.load(products + i * D + cols, mask=cols < D, other=0.0)
        g += label_factor * tl.load(w + own * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        tl.store(grad + i * D + cols, (g * scale).to(grad.dtype.element_ty), mask=cols < D)
