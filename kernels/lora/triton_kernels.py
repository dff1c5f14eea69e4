# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of the LoRA matmul: four passes over tensors whose narrow side is the rank.

    down       u[N, R]  = drop(x)[N, K] A[R, K]^T          one read of x
    up         y[N, O]  = scale * u B^T + bias             one write of y
    grad_up    du, dB   = scale * dy B, scale * dy^T u     one read of dy, float32 partial sums
    grad_down  dA, dx   = du^T drop(x), drop(du A)         one read of x, one write of dx

and `drop`, dropout by itself, for DoRA, whose base product sees the dropped x too.

N rows (tokens), K in features, O (as a size: OUT) out features, R ranks. Dropout's factor 1 / (1 - p) is in `scale`.
Sums over more than one program are written as float32 partials and added in order by `ordered_sum`: no atomics, bitwise
repeatable. triton_backend.py launches them.
"""

import triton
import triton.language as tl

SEVEN: tl.constexpr = tl.constexpr(7)  # philox.ROUNDS
# What changes from batch to batch must not compile a kernel anew: Triton would for a 1 and for a multiple of 16.
UNTYPED = ["N", "rows", "num_parts", "threshold", "seed_low", "seed_high"]


@triton.jit
def _kept(rows, columns_by_8, threshold, seed_low, seed_high):
    """Dropout's mask of a tile, [BLOCK_N, 8 * groups], as in philox.py."""
    seed = (seed_high.to(tl.uint32).to(tl.uint64) << 32) | seed_low.to(tl.uint32).to(tl.uint64)
    row, group = rows.to(tl.uint32)[:, None], columns_by_8[None, :].to(tl.uint32)
    zero = (group + row) * 0
    w0, w1, w2, w3 = tl.philox(seed, group + zero, row + zero, zero, zero, SEVEN)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2, 2]: word 2 * i + j is at [i, j]
    draws = tl.join(words & 0xFFFF, words >> 16)
    draws = tl.reshape(draws, (rows.shape[0], columns_by_8.shape[0] * 8))
    return draws.to(tl.int32) >= threshold


@triton.jit(do_not_specialize=UNTYPED)
def down(
    x_NK, a_RK, u_NR, N, K, R, threshold, seed_low, seed_high,
    DROP: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # first: programs that read the same x run together
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_starts = rows.to(tl.int64)[:, None]
    u = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns[None, :] < K
        x = tl.load(x_NK + row_starts * K + columns[None, :], mask=(rows[:, None] < N) & inside, other=0.0)
        a = tl.load(a_RK + ranks[:, None] * K + columns[None, :], mask=(ranks[:, None] < R) & inside, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            a = a.to(tl.float32)
        if DROP:
            groups = start // 8 + tl.arange(0, BLOCK_K // 8)
            kept = _kept(rows, groups, threshold, seed_low, seed_high)
            x = tl.where(kept, x, 0.0)
        u = tl.dot(x, tl.trans(a), u, input_precision="ieee")
    inside = (rows[:, None] < N) & (ranks[None, :] < R)
    tl.store(u_NR + row_starts * R + ranks[None, :], u.to(u_NR.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNTYPED)
def up(
    u_NR, b_OR, bias_O, y_NO, N, OUT, R, rank_B, scale,
    BIAS: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """R is the row length of u, of which this adapter's ranks are the first rank_B; rank_B is the row length of B."""
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_starts = rows.to(tl.int64)[:, None]
    y = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, rank_B, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        inside = ranks[None, :] < rank_B
        u = tl.load(u_NR + row_starts * R + ranks[None, :], mask=(rows[:, None] < N) & inside, other=0.0)
        b = tl.load(b_OR + outs[:, None] * rank_B + ranks[None, :], mask=(outs[:, None] < OUT) & inside, other=0.0)
        if WIDEN:
            u = u.to(tl.float32)
            b = b.to(tl.float32)
        y = tl.dot(u, tl.trans(b), y, input_precision="ieee")
    y = y * scale
    if BIAS:
        y += tl.load(bias_O + outs, mask=outs < OUT, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < N) & (outs[None, :] < OUT)
    tl.store(y_NO + row_starts * OUT + outs[None, :], y.to(y_NO.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNTYPED)
def grad_up(
    dy_NO, u_NR, b_OR, du_parts, db_parts, N, OUT, R, rank_B, first_rank, chunk,
    DU: tl.constexpr, DB: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of the ranks first_rank to first_rank + BLOCK_R of one adapter, whose ranks are rank_B; u starts at its ranks.

    du_parts: [blocks of O, N, BLOCK_R], db_parts: [chunks of rows, O, BLOCK_R], float32, without the scale.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    outs = block * BLOCK_O + tl.arange(0, BLOCK_O)
    lanes = tl.arange(0, BLOCK_R)
    ranks = first_rank + lanes
    b = tl.load(
        b_OR + outs[:, None] * rank_B + ranks[None, :],
        mask=(outs[:, None] < OUT) & (ranks[None, :] < rank_B),
        other=0.0,
    )
    if WIDEN:
        b = b.to(tl.float32)
    db = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for start in range(part * chunk, tl.minimum(N, (part + 1) * chunk), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        row_starts = rows.to(tl.int64)[:, None]
        inside = rows[:, None] < N
        dy = tl.load(dy_NO + row_starts * OUT + outs[None, :], mask=inside & (outs[None, :] < OUT), other=0.0)
        if WIDEN:
            dy = dy.to(tl.float32)
        if DB:
            u = tl.load(u_NR + row_starts * R + ranks[None, :], mask=inside & (ranks[None, :] < rank_B), other=0.0)
            if WIDEN:
                u = u.to(tl.float32)
            db = tl.dot(tl.trans(dy), u, db, input_precision="ieee")
        if DU:
            du = tl.dot(dy, b, input_precision="ieee")
            places = (block.to(tl.int64) * N + row_starts) * BLOCK_R + lanes[None, :]
            tl.store(du_parts + places, du, mask=inside)
    if DB:
        places = (part.to(tl.int64) * OUT + outs[:, None]) * BLOCK_R + lanes[None, :]
        tl.store(db_parts + places, db, mask=outs[:, None] < OUT)


@triton.jit(do_not_specialize=UNTYPED)
def grad_down(
    x_NK, du_NR, a_RK, dx_NK, da_parts, N, K, R, first_rank, chunk, threshold, seed_low, seed_high,
    DROP: tl.constexpr, DA: tl.constexpr, DX: tl.constexpr, ADD: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of the ranks first_rank to first_rank + BLOCK_R; with ADD, dx already holds the part of the ranks before.

    da_parts: [chunks of rows, BLOCK_R, K], float32.
    """
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_R)
    ranks = first_rank + lanes
    within = columns[None, :] < K
    if DX:
        a = tl.load(a_RK + ranks[:, None] * K + columns[None, :], mask=(ranks[:, None] < R) & within, other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
    da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(part * chunk, tl.minimum(N, (part + 1) * chunk), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        row_starts = rows.to(tl.int64)[:, None]
        inside = (rows[:, None] < N) & within
        du = tl.load(
            du_NR + row_starts * R + ranks[None, :], mask=(rows[:, None] < N) & (ranks[None, :] < R), other=0.0
        )
        if WIDEN:
            du = du.to(tl.float32)
        if DA:
            x = tl.load(x_NK + row_starts * K + columns[None, :], mask=inside, other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
        if DROP:  # after the load of x: before it, one configuration spills on sm_90
            groups = tl.program_id(0) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            kept = _kept(rows, groups, threshold, seed_low, seed_high)
        if DA:
            if DROP:
                x = tl.where(kept, x, 0.0)
            da = tl.dot(tl.trans(du), x, da, input_precision="ieee")
        if DX:
            dx = tl.dot(du, a, input_precision="ieee")
            if DROP:
                dx = tl.where(kept, dx, 0.0)
            if ADD:
                dx += tl.load(dx_NK + row_starts * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_NK + row_starts * K + columns[None, :], dx.to(dx_NK.dtype.element_ty), mask=inside)
    if DA:
        places = (part.to(tl.int64) * BLOCK_R + lanes[:, None]) * K + columns[None, :]
        tl.store(da_parts + places, da, mask=within)


@triton.jit(do_not_specialize=UNTYPED)
def drop(
    x_NK, out_NK, N, K, scale, threshold, seed_low, seed_high,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = scale * x where the mask keeps an element, else 0."""
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    groups = tl.program_id(0) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    kept = _kept(rows, groups, threshold, seed_low, seed_high)
    places = rows.to(tl.int64)[:, None] * K + columns[None, :]
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    x = tl.load(x_NK + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_NK + places, tl.where(kept, x * scale, 0.0).to(out_NK.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNTYPED)
def ordered_sum(parts, out, num_parts, part_size, width, rows, columns, out_stride, scale, BLOCK: tl.constexpr):
    """out[rows, columns] = scale * sum of parts, one after another; each part is [.., width], of which out has less."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = places // width, places % width
    inside = (row < rows) & (column < columns)
    total = tl.zeros((BLOCK,), tl.float32)
    pointers = parts + places
    for _ in range(num_parts):
        total += tl.load(pointers, mask=inside, other=0.0)
        pointers += part_size
    tl.store(out + row * out_stride + column, (total * scale).to(out.dtype.element_ty), mask=inside)
