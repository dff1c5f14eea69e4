"""What the device can do at best: a matrix product and a copy, timed for a moment."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SECONDS = 0.15  # of measuring, for each figure
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Ceilings:
    device: str
    dtype: str  # as engine.precision says it
    flops: float  # a second, of a large product
    bytes_per_second: float  # read and written, of a large copy
    flops_bf16: float | None = None  # on a GPU, where another dtype is trained with
    memory_bytes: int | None = None  # of a GPU


def measure(device: torch.device, dtype: str) -> Ceilings:
    is_gpu = device.type == "cuda"
    size = 4096 if is_gpu else 768 if dtype == "fp32" else 256  # a CPU may compute 16 bits in software
    copied = 2**27 if is_gpu else 2**24  # elements of 4 bytes: beyond any cache
    flops = _flops(device, DTYPES[dtype], size)
    source = torch.ones(copied, device=device)
    target = torch.empty_like(source)
    moved = 2 * 4 * copied / _best(lambda: target.copy_(source), device)
    if not is_gpu:
        return Ceilings(f"CPU, {torch.get_num_threads()} thread(s)", dtype, flops, moved)
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    return Ceilings(
        name, dtype, flops, moved, _flops(device, torch.bfloat16, size) if dtype == "fp32" else None, memory
    )


def _flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / _best(lambda: torch.mm(left, left, out=out), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several tries."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    best, end = once(), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, once())
    return best
