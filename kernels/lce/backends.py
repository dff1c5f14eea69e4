"""Which back end computes a call of linear_cross_entropy, and in chunks of how many rows."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tunesmith.kernels.device import num_multiprocessors, why_not_triton
from tunesmith.kernels.lce import torch_backend
from tunesmith.kernels.lce.head import Head, Rows

BACKENDS = ("auto", "triton", "anchored", "chunked", "torch")
# On a GPU a chunk is a matter of filling the multiprocessors; on a CPU, of staying in the cache between passes.
GPU_SLAB_BYTES = 2**29
GPU_SLAB_BYTES_TRAINABLE = 2**30  # every chunk reads and writes the whole float32 gradient of the head: fewer, larger
CPU_SLAB_BYTES = 2**24
FLOP_PER_BYTE = 184  # what an H200 multiplies while it reads a byte: 790 TFLOP/s, 4.3 TB/s (docs/kernels.md)
TILE_ROWS, TILE_COLUMNS = 128, 256  # of cuBLAS's 16-bit products on A100 and H100

Chunk = Callable[[Head, torch.Tensor, torch.Tensor, torch.Tensor], Rows]


@dataclass(frozen=True)
class ChosenBackend:
    name: str
    chunk: Chunk
    sizes: list[int]  # rows of each chunk


def choose_backend(backend: str, head: Head, hidden_ND: torch.Tensor) -> ChosenBackend:
    """The back end for these tensors. Raises ValueError for a name that means nothing."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    chosen = "torch" if backend == "torch" else _triton_backend(backend, head, hidden_ND)
    chunk: Chunk = torch_backend.chunk
    if chosen == "chunked":
        from tunesmith.kernels.lce import chunked

        chunk = chunked.chunk
    elif chosen == "anchored":
        from tunesmith.kernels.lce import anchored

        chunk = anchored.chunk
    return ChosenBackend(chosen, chunk, chunk_sizes(chosen, head, hidden_ND))


def _triton_backend(backend: str, head: Head, hidden_ND: torch.Tensor) -> str:
    """The Triton back end that covers the call, else torch; what was asked for by name and is not had is said once."""
    device = hidden_ND.device
    if backend == "auto" and device.type == "cpu":
        return "torch"
    reason = why_not_triton(device)
    if reason is None and hidden_ND.dtype == torch.float64:
        reason = "it does not compute in float64"
    if reason is not None:
        if backend != "auto":
            _say_once(backend, "torch", reason)
        return "torch"
    wanted = backend if backend in ("anchored", "chunked") else preferred(device, head.unembed_VD)
    reason = why_not_anchored(head, hidden_ND.dtype) if wanted == "anchored" else None
    if reason is None:
        return wanted
    if backend == "anchored":
        _say_once(backend, "chunked", reason)
    return "chunked"


def preferred(device: torch.device, unembed_VD: torch.Tensor) -> str:
    """The faster Triton back end by the roofline of docs/kernels.md, unless a timed pick says otherwise for a head."""
    found = picked.get(tuple(unembed_VD.shape))
    if found is not None:
        return found
    return "anchored" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else "chunked"


picked: dict[tuple[int, ...], str] = {}  # (V, D) -> back end: timed_pick.py fills it


def why_not_anchored(head: Head, dtype: torch.dtype) -> str | None:
    """What of a call the anchored back end does not cover, in words."""
    if dtype == torch.float16:
        return "float16 cannot hold exp(logit - label's logit)"
    if dtype == torch.float32 and not head.unembed_VD.is_cpu:
        return "its tiles are for 16 bits, and float32 products without tensor cores are best left to cuBLAS"
    if head.grad_bias is not None:
        return "it makes no gradient for a bias"
    return None


def _say_once(asked: str, instead: str, reason: str) -> None:
    if (asked, instead, reason) not in _said:
        _said.add((asked, instead, reason))
        warnings.warn(f"linear_cross_entropy: backend {instead} instead of {asked}: {reason}.", stacklevel=2)


_said: set[tuple[str, str, str]] = set()


def chunk_sizes(backend: str, head: Head, hidden_ND: torch.Tensor) -> list[int]:
    """Rows of each chunk: as many as the slab allows, in equal parts, or on a GPU in whole waves and what is left."""
    num_rows, hidden_size = hidden_ND.shape
    row_bytes = slab_row_bytes(backend, head, hidden_ND.dtype)
    on_gpu = not hidden_ND.is_cpu
    slab_bytes = CPU_SLAB_BYTES
    if on_gpu:
        slab_bytes = GPU_SLAB_BYTES if head.grad_unembed is None else GPU_SLAB_BYTES_TRAINABLE
    most = max(1, slab_bytes // row_bytes)
    if num_rows <= most:
        return [num_rows] if num_rows else []
    if not on_gpu or most < TILE_ROWS:
        rows = _ceil(num_rows, _ceil(num_rows, most))
        return [min(rows, num_rows - start) for start in range(0, num_rows, rows)]
    num_sms, trainable = num_multiprocessors(hidden_ND.device), head.grad_unembed is not None
    rows = wave_rows(most, hidden_size, num_sms, trainable)
    whole, rest = divmod(num_rows, rows)
    sizes = [rows] * whole
    if 0 < rest <= TILE_ROWS and rows + rest <= most and joining_pays(rows, rest, hidden_size, num_sms, trainable):
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def slab_row_bytes(backend: str, head: Head, dtype: torch.dtype) -> int:
    """Bytes that one row of logits takes in a back end."""
    columns = len(head.unembed_VD)
    if backend != "torch":
        return columns * (2 if dtype in (torch.bfloat16, torch.float16) else 4)
    slabs = 1 + (head.logit_softcap is not None and head.wants_gradient) + head.wants_stats
    return columns * slabs * (8 if dtype == torch.float64 else 4)


def wave_rows(most: int, hidden_size: int, num_sms: int, trainable: bool) -> int:
    """The multiple of 128 rows up to `most` whose [rows, D] product leaves the fewest multiprocessors idle in its last
    wave of tiles; of those within 2 %, the smallest, or with a trainable head the largest (kernels.md section 4.3).
    """
    filled = {}
    for rows in range(TILE_ROWS, most + 1, TILE_ROWS):
        tiles = rows // TILE_ROWS * _ceil(hidden_size, TILE_COLUMNS)
        filled[rows] = tiles / (_ceil(tiles, num_sms) * num_sms)
    good = [rows for rows, share in filled.items() if share >= max(filled.values()) - 0.02]
    return max(good) if trainable else min(good)


def joining_pays(rows: int, rest: int, hidden_size: int, num_sms: int, trainable: bool) -> bool:
    """Whether a tile or less of rows costs less in the chunk before than as a chunk of its own, which reads the head
    twice, and reads and writes the gradient of a trained one. In the chunk before, it may begin another wave of tiles.
    In FLOP for each entry of the vocabulary.
    """
    alone = FLOP_PER_BYTE * hidden_size * (2 * 2 + 8 * trainable)
    waves = [_ceil(_ceil(r, TILE_ROWS) * _ceil(hidden_size, TILE_COLUMNS), num_sms) for r in (rows, rows + rest)]
    another_wave = (waves[1] - waves[0]) * num_sms * 2 * TILE_ROWS * TILE_COLUMNS
    return another_wave + (1 + trainable) * 2 * TILE_ROWS * hidden_size < alone


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
