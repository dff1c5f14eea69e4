"""Where Triton kernels can run, and matrix products that add up in float32 whatever their operands are."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: its kernels run on the CPU, slowly
DEBUG = os.environ.get("TUNESMITH_DEBUG") == "1"  # looks into tensors on a GPU too, which waits for it
MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 matrix units


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, in words; None where they can."""
    if device.type == "cpu":
        return None if INTERPRETED else "there is no GPU"
    if device.type != "cuda":
        return f"Triton kernels are for CUDA devices, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None


@cache
def arch(device: torch.device) -> int:
    """Which table of block sizes a device reads: 90 Hopper, 80 any other GPU, 0 the interpreter."""
    if device.type == "cpu":
        return 0
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 under the interpreter, so that persistent loops go round."""
    return 2 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products are of the dtypes they are given: autocast would round float32 ones to 16 bits."""
    is_enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)  # which it does not know
    return torch.autocast(device.type, enabled=False) if is_enabled else nullcontext()


def on_its_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, kernels go to this GPU: Triton launches on the current one. Autograd sees to it in a backward pass."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def mm_fp32(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """a @ b, [M, N] float32 (float64 for float64); 16-bit operands are multiplied as they are on a GPU."""
    if a_MK.dtype not in (torch.bfloat16, torch.float16):
        return a_MK @ b_KN
    if a_MK.is_cuda:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return a_MK.float() @ b_KN.float()


def add_mm_fp32(sum_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, *, start: bool) -> None:
    """sum += a @ b in place, in the dtype of sum (float32 or wider); with start, sum = a @ b, whatever it held."""
    beta = 0 if start else 1
    if a_MK.is_cuda and a_MK.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=torch.float32, beta=beta, out=sum_MN)
    else:
        torch.addmm(sum_MN, a_MK.to(sum_MN.dtype), b_KN.to(sum_MN.dtype), beta=beta, out=sum_MN)
