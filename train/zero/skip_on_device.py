"""A gradient that is not finite leaves the weights alone without the host being asked.

DeepSpeed 0.19.8 looks for one by reading every gradient again (five operations each) and having the host wait, and then
asks the norm of all gradients the same, with two more waits. The norm alone says it, on all ranks alike: it is infinite
or NaN, or DeepSpeed's -1 for that. torch's fused AdamW takes that as a tensor, found_inf, and leaves weights, moments
and counts as they are where it is 1.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.train.config.config import Config, Offload, Precision


def can_skip_on_device(config: Config) -> bool:
    """Not with fp16, whose loss scale the host keeps, nor where the optimizer is in host memory."""
    engine = config.engine
    return engine.precision is not Precision.fp16 and engine.offload_optimizer is Offload.none


def is_invalid(norm: torch.Tensor) -> torch.Tensor:
    """[] bool, on the norm's device: no norm of finite gradients."""
    return ~torch.isfinite(norm) | (norm < 0)


@contextmanager
def skipping_on_device(zero_optimizer: Any) -> Iterator[None]:
    """Around one step of DeepSpeed's optimizer of ZeRO 1 to 3 over torch's fused AdamW."""
    adamw, module = zero_optimizer.optimizer, sys.modules[type(zero_optimizer).__module__]
    asked = vars(module)["is_invalid_grad_norm"]

    def note(norm: torch.Tensor) -> bool:
        adamw.found_inf = is_invalid(norm).float()
        return False

    zero_optimizer.check_overflow = lambda partition_gradients=True: None
    vars(module)["is_invalid_grad_norm"] = note
    try:
        yield
    finally:
        vars(module)["is_invalid_grad_norm"] = asked
        del zero_optimizer.check_overflow, adamw.found_inf
