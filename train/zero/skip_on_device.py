"""A gradient that is not finite leaves the weights alone without the host being asked.

DeepSpeed 0.19.8 looks for one by reading every gradient again (five operations each) and having the host wait, and then
asks the norm of all gradients the same, with two more waits. The norm alone says it, on all ranks alike: it is infinite
or NaN, or DeepSpeed's -1 for that. torch's fused optimizers take that as a tensor, found_inf, and where it is 1 leave
weights, moments and counts as they are.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.train.config.config import Config, Offload, Precision

# It writes -1 for inf and NaN with a number copied from the host, which waits; what combines the norms knows all three.
MASKING = "mask_nan_or_inf_with_val_inplace"


def can_skip_on_device(config: Config) -> bool:
    """Not with fp16, whose loss scale the host keeps, nor where the optimizer is in host memory."""
    engine = config.engine
    return engine.precision is not Precision.fp16 and engine.offload_optimizer is Offload.none


def is_invalid(norm: torch.Tensor) -> torch.Tensor:
    """[] bool, on the norm's device: no norm of finite gradients."""
    return ~torch.isfinite(norm) | (norm < 0)


@contextmanager
def skipping_on_device(zero_optimizer: Any) -> Iterator[None]:
    """Around one step of DeepSpeed's optimizer of ZeRO 1 to 3 over one of torch's fused optimizers."""
    fused, module = zero_optimizer.optimizer, sys.modules[type(zero_optimizer).__module__]

    def note(norm: torch.Tensor) -> bool:
        fused.found_inf = is_invalid(norm).float()
        return False

    zero_optimizer.check_overflow = lambda partition_gradients=True: None
    instead = {"is_invalid_grad_norm": note, MASKING: lambda norm, device=None: None}
    before = {name: vars(module)[name] for name in instead if name in vars(module)}
    vars(module).update({name: instead[name] for name in before})
    try:
        yield
    finally:
        vars(module).update(before)
        del zero_optimizer.check_overflow
        vars(fused).pop("found_inf", None)  # there unless the step failed before its norm
