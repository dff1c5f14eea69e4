"""The back end of an operation that is one pass over its tensors: Triton on a GPU, plain torch elsewhere."""

from typing import Literal

import torch

from tunesmith.kernels.device import why_not_triton

Backend = Literal["auto", "triton", "torch"]


def is_triton(backend: Backend, x: torch.Tensor) -> bool:
    """Whether a call runs as a Triton kernel. Raises ValueError where it is asked to and cannot."""
    if backend == "torch":
        return False
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend={backend!r} is not auto, triton or torch.")
    why_not = why_not_triton(x.device)
    if x.dtype is torch.float64:
        why_not = "the kernels compute in float32, and x is float64"
    if backend == "triton" and why_not:
        raise ValueError(f"backend=triton cannot run here: {why_not}.")
    return not why_not and x.numel() > 0


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; torch refuses to say for meta, on which nothing is computed."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
