"""Launches of the LoRA kernels: the same passes as torch_backend.py, with the same arguments."""

import torch

from tunesmith.kernels.blocks import even
from tunesmith.kernels.device import INTERPRETED, num_multiprocessors
from tunesmith.kernels.lora import block_tables, triton_kernels
from tunesmith.kernels.philox import Dropout

RANK_STEP = block_tables.RANK_STEP
PROGRAMS_PER_MULTIPROCESSOR = 2  # of the passes that leave partial sums: what fits at once, so that few are left


def down(x_NK: torch.Tensor, a_RK: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """u[N, R] = drop(x) A^T, without dropout's factor."""
    (rows, columns), ranks = x_NK.shape, len(a_RK)
    u_NR = x_NK.new_empty(rows, ranks)
    bucket = block_tables.bucket(ranks, x_NK.dtype, x_NK.device)
    vectors = even(columns, x_NK, a_RK)
    sizes = block_tables.choose("down", bucket, x_NK.dtype, x_NK.device, (rows, columns, ranks), vectors)
    grid = (_ceil(ranks, bucket), _ceil(rows, sizes["BLOCK_N"]))
    triton_kernels.down[grid](
        x_NK, a_RK, u_NR, rows, columns, ranks, *_draws(dropout), DROP=dropout is not None, WIDEN=INTERPRETED, **sizes
    )
    return u_NR


def up(u_NR: torch.Tensor, b_OR: torch.Tensor, scale: float, bias_O: torch.Tensor | None) -> torch.Tensor:
    """y[N, O] = scale * u B^T + bias; u holds this adapter's ranks first."""
    rows, (outs, rank) = len(u_NR), b_OR.shape
    y_NO = u_NR.new_empty(rows, outs)
    bucket = block_tables.bucket(rank, u_NR.dtype, u_NR.device)
    vectors = even(outs, u_NR, b_OR) and _even_rank(rank)
    sizes = block_tables.choose("up", bucket, u_NR.dtype, u_NR.device, (rows, outs, rank), vectors)
    grid = (_ceil(outs, sizes["BLOCK_O"]), _ceil(rows, sizes["BLOCK_N"]))
    flags = {"BIAS": bias_O is not None, "WIDEN": INTERPRETED}
    triton_kernels.up[grid](
        u_NR, b_OR, b_OR if bias_O is None else bias_O, y_NO, rows, outs, u_NR.stride(0), rank, scale, **flags, **sizes
    )
    return y_NO


def grad_up(
    dy_NO: torch.Tensor,
    u_NR: torch.Tensor | None,
    b_OR: torch.Tensor,
    scale: float,
    du_NR: torch.Tensor | None,
    *,
    wants_b: bool,
) -> torch.Tensor | None:
    """Writes scale * dy B into du and returns dB[O, r] = scale * dy^T u. u and du begin with this adapter's ranks."""
    (rows, outs), rank, device = dy_NO.shape, b_OR.shape[1], dy_NO.device
    bucket = block_tables.bucket(rank, dy_NO.dtype, device)
    vectors = even(outs, dy_NO, b_OR) and _even_rank(rank)
    sizes = block_tables.choose("grad_up", bucket, dy_NO.dtype, device, (rows, outs, rank), vectors)
    blocks = _ceil(outs, sizes["BLOCK_O"])
    chunk = _chunk(rows, blocks, sizes["BLOCK_N"], device)
    parts = _ceil(rows, chunk)
    db_OR = torch.empty_like(b_OR) if wants_b else None
    du_parts = dy_NO.new_empty((blocks, rows, bucket) if du_NR is not None else (1,), dtype=torch.float32)
    db_parts = dy_NO.new_empty((parts, outs, bucket) if wants_b else (1,), dtype=torch.float32)
    flags = {"DU": du_NR is not None, "DB": wants_b, "WIDEN": INTERPRETED}
    u_NR = b_OR if u_NR is None else u_NR  # a pointer that is not read
    for first in range(0, rank, bucket):
        triton_kernels.grad_up[blocks, parts](
            dy_NO, u_NR, b_OR, du_parts, db_parts, rows, outs, u_NR.stride(0), rank, first, chunk, **flags, **sizes
        )
        if du_NR is not None:
            _ordered_sum(du_parts, du_NR[:, first : first + bucket], scale)
        if db_OR is not None:
            _ordered_sum(db_parts, db_OR[:, first : first + bucket], scale)
    return db_OR


def grad_down(
    x_NK: torch.Tensor | None,
    du_NR: torch.Tensor,
    a_RK: torch.Tensor,
    dropout: Dropout | None,
    *,
    wants_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dA[R, K] = du^T drop(x), where x is given, and dx[N, K] = drop(du A), where it is wanted."""
    (rows, ranks), columns, device = du_NR.shape, a_RK.shape[1], du_NR.device
    bucket = block_tables.bucket(ranks, du_NR.dtype, device)
    vectors = even(columns, a_RK) and (x_NK is None or even(x_NK))
    sizes = block_tables.choose("grad_down", bucket, du_NR.dtype, device, (rows, columns, ranks), vectors)
    blocks = _ceil(columns, sizes["BLOCK_K"])
    chunk = _chunk(rows, blocks, sizes["BLOCK_N"], device)
    parts = _ceil(rows, chunk)
    da_RK = None if x_NK is None else torch.empty_like(a_RK)
    dx_NK = du_NR.new_empty(rows, columns) if wants_x else None
    da_parts = du_NR.new_empty((1,) if x_NK is None else (parts, bucket, columns), dtype=torch.float32)
    flags = {"DROP": dropout is not None, "DA": x_NK is not None, "DX": wants_x, "WIDEN": INTERPRETED}
    tensors = (du_NR if x_NK is None else x_NK, du_NR, a_RK, du_NR if dx_NK is None else dx_NK, da_parts)
    for first in range(0, ranks, bucket):
        numbers = (rows, columns, ranks, first, chunk, *_draws(dropout))
        triton_kernels.grad_down[blocks, parts](*tensors, *numbers, ADD=first > 0, **flags, **sizes)
        if da_RK is not None:
            _ordered_sum(da_parts, da_RK[first : first + bucket], 1.0)
    return da_RK, dx_NK


def drop(x_NK: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Dropout by itself: x / (1 - p) where the mask keeps an element, else 0."""
    rows, columns = x_NK.shape
    out_NK = torch.empty_like(x_NK)
    sizes = block_tables.DROP_BLOCK
    grid = (_ceil(columns, sizes["BLOCK_K"]), _ceil(rows, sizes["BLOCK_N"]))
    triton_kernels.drop[grid](x_NK, out_NK, rows, columns, dropout.keep_scale, *_draws(dropout), **sizes.launch)
    return out_NK


def _ordered_sum(parts: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """out = scale * the sum of parts, one after another, for as many rows and columns as out has."""
    num_parts, _, width = parts.shape
    rows, columns = out.shape
    grid = (_ceil(rows * width, block_tables.SUM_BLOCK),)
    triton_kernels.ordered_sum[grid](
        parts,
        out,
        num_parts,
        parts[0].numel(),
        width,
        rows,
        columns,
        out.stride(0),
        scale,
        BLOCK=block_tables.SUM_BLOCK,
    )


def _even_rank(rank: int) -> bool:
    """Rows of B may be short: its smallest blocks are for ranks of 1 to 16, whatever they are multiples of."""
    return rank <= RANK_STEP or even(rank)


def _draws(dropout: Dropout | None) -> tuple[int, int, int]:
    """Arguments of the mask, as int32: a seed's size must not change the type a kernel is compiled for."""
    if dropout is None:
        return 0, 0, 0
    return dropout.threshold, _int32(dropout.seed), _int32(dropout.seed >> 32)


def _int32(bits: int) -> int:
    """The low 32 bits as a signed number."""
    return ((bits & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _chunk(rows: int, blocks: int, block: int, device: torch.device) -> int:
    """Rows of one program: whole blocks of them, so that all programs together fill the device about once."""
    chunks = max(1, PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device) // blocks)
    return _ceil(_ceil(rows, block), chunks) * block


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
