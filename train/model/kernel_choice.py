"""Which of our kernels a run uses, decided once from the config and the device."""

import torch

from tunesmith.kernels.device import why_not_triton
from tunesmith.train.config.config import Config, Kernels
from tunesmith.train.errors import ConfigError


def choose_kernels(config: Config, device: torch.device) -> Kernels:
    """What `kernels` comes to on a device: triton, torch or off. Raises ConfigError where triton cannot be had."""
    why_not = why_not_triton(device)
    if config.kernels is Kernels.auto:
        return Kernels.torch if why_not or device.type == "cpu" else Kernels.triton
    if config.kernels is Kernels.triton and why_not:
        raise ConfigError(
            f"kernels=triton, but {why_not}.", key="kernels", do="set kernels=auto, or torch, which runs anywhere."
        )
    return config.kernels
