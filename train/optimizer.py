"""AdamW, and all that knows it: another optimizer is this file, its schema (config/schema/optimizer.py) and a yaml.

What a checkpoint keeps of an optimizer is read from its state: `step`, and every tensor that is no single number.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.train.config.config import Config, Offload
from tunesmith.train.zero.deepspeed import deepspeed
from tunesmith.train.zero.sharding import full_shape

STATE_BYTES = 12  # of each trained weight: the fp32 master weight and two moments


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and norms, biases and embeddings, which do not."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = len(full_shape(parameter)) >= 2 and id(parameter) not in embeddings
            (decayed if matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """DeepSpeed's CPU kernel under offload, torch's fused one elsewhere. groups are parameter_groups()."""
    arguments: dict[str, Any] = {"lr": config.optimizer.learning_rate, **_settings(config)}
    if config.engine.offload_optimizer is not Offload.none:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    return torch.optim.AdamW(groups, fused=True, **arguments)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def apply_settings(optimizer: Any, groups: list[dict[str, Any]], config: Config) -> None:
    """The config's settings, where a checkpoint has put back its own: they may have been changed.

    groups: as parameter_groups() made them, without their parameters.
    """
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(**own, **_settings(config))


def state_of(optimizer: Any, weights: Tensor, updates: float, moments: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an optimizer keeps of weights updated so often: torch's counts in a tensor, DeepSpeed's in an int."""
    counts_in_tensor = isinstance(optimizer, torch.optim.AdamW)
    step = torch.tensor(updates, dtype=torch.float32, device=weights.device) if counts_in_tensor else int(updates)
    return {"step": step, **moments}


def first_gradient(optimizer: Any, weights: Tensor) -> Tensor:
    """What the first update of some weights was made with, clipped or not, float64."""
    moment: Tensor = optimizer.state[weights]["exp_avg"]
    return moment.double() / (1 - optimizer.param_groups[0]["betas"][0])


def _settings(config: Config) -> dict[str, Any]:
    settings = config.optimizer
    return {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}
