"""Where Triton kernels can run, and matrix products that add up in float32 whatever their operands are."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: its kernels run on the CPU, slowly
DEBUG = os.environ.get("TUNESMITH_DEBUG") == "1"  # looks into tensors on a GPU too, which waits for it
MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 matrix units
SIXTEEN_BITS = torch.bfloat16, torch.float16
STRIP_ELEMENTS = 2**24  # 64 MiB of float32


@dataclass(frozen=True)
class GPU:
    """What a GPU would answer."""

    arch: int
    num_multiprocessors: int


pretended: GPU | None = None  # of meta tensors: dry_launches.py sets it


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, in words; None where they can."""
    if device.type == "cpu":
        return None if INTERPRETED else "there is no GPU"
    if device.type == "meta" and pretended is not None:
        return None
    if device.type != "cuda":
        return f"Triton kernels are for CUDA devices, not {device.type}"
    if not is_ampere(device):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None


@cache
def is_ampere(device: torch.device) -> bool:
    """Whether a GPU is of that generation or a later one."""
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def arch(device: torch.device) -> int:
    """Which table of block sizes a device reads: 90 Hopper, 80 any other GPU, 0 the interpreter."""
    if device.type == "cpu":
        return 0
    return _gpu(device).arch


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 under the interpreter, so that persistent loops go round."""
    return 2 if device.type == "cpu" else _gpu(device).num_multiprocessors


def _gpu(device: torch.device) -> GPU:
    if device.type == "meta":
        assert pretended is not None
        return pretended
    return _real_gpu(device)


@cache
def _real_gpu(device: torch.device) -> GPU:
    properties = torch.cuda.get_device_properties(device)
    return GPU(90 if properties.major == 9 else 80, int(properties.multi_processor_count))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products are of the dtypes they are given: autocast would round float32 ones to 16 bits."""
    kind = device.type
    could = torch.amp.is_autocast_available(kind)  # not on meta tensors
    return torch.autocast(kind, enabled=False) if could and torch.is_autocast_enabled(kind) else nullcontext()


def on_its_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, kernels go to this GPU: Triton launches on the current one. Autograd sees to it in a backward pass."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def mm_fp32(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """a @ b, [M, N] float32 (float64 for float64); 16-bit operands are multiplied as they are on a GPU."""
    if a_MK.dtype not in SIXTEEN_BITS:
        return a_MK @ b_KN
    if a_MK.is_cpu:
        return a_MK.float() @ b_KN.float()
    return torch.mm(a_MK, b_KN, out_dtype=torch.float32)


def add_mm_fp32(sum_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, *, start: bool) -> None:
    """sum += a @ b in place, in the dtype of sum (float32 or wider); with start, sum = a @ b, whatever it held."""
    beta = 0 if start else 1
    if a_MK.dtype not in SIXTEEN_BITS:
        torch.addmm(sum_MN, a_MK.to(sum_MN.dtype), b_KN.to(sum_MN.dtype), beta=beta, out=sum_MN)
    elif addmm_widens_in_place(a_MK.device, a_MK.dtype):
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=torch.float32, beta=beta, out=sum_MN)
    else:  # strip by strip: the product alone would take as much memory as the sum
        strip = max(1, STRIP_ELEMENTS // b_KN.shape[1])
        for sum_part, a_part in zip(sum_MN.split(strip), a_MK.split(strip), strict=True):
            product = mm_fp32(a_part, b_KN)
            sum_part.copy_(product) if start else sum_part.add_(product)


@cache
def addmm_widens_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a product of 16 bits onto a float32 matrix in place, tried once: versions of torch from
    2.10 on differ in whether they take a float32 matrix there, and on a CPU none does.
    """
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.full((16, 16), torch.nan, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, beta=0, out=total)
        total += 2**-10  # which 16 bits next to 16 do not hold
        torch.addmm(total, ones, ones, out_dtype=torch.float32, beta=1, out=total)
        return bool((total == 32 + 2**-10).all())
    except (RuntimeError, TypeError):
        return False
