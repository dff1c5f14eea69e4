"""Parameters that ZeRO 3 holds in parts: made so, seen whole for a moment, and their true shape.

DeepSpeed is imported where a parameter is split and nowhere else: talking to a finished model must not load it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from tunesmith.train.config.config import Config
from tunesmith.train.ranks.distributed import World
from tunesmith.train.zero.deepspeed_config import deepspeed_config, raw_keys_explained


def sharded_init(config: Config, world: World) -> AbstractContextManager[None]:
    """Modules made inside are split over the ranks at once under ZeRO 3, so that no rank ever holds the whole model.

    Their dtype is that of engine.precision, by way of the config: zero.Init(dtype=...) of DeepSpeed 0.19.8 makes
    bfloat16 of any dtype where the accelerator has no fp16, as on most CPUs (partition_parameters.py, _set_dtype), and
    then rotary frequencies are rounded to three digits.
    """
    if config.engine.stage != 3:
        return nullcontext()
    from tunesmith.train.zero.deepspeed import deepspeed

    deepspeed.init_distributed()  # takes over the ranks that have met; without it zero.Init counts one
    with raw_keys_explained(config):
        return deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config, world.world_size))


@contextmanager
def known_to_peft(config: Config, world: World) -> Iterator[None]:
    """Inside, PEFT gathers a split weight before it reads it, as DoRA does: it asks transformers if any is split."""
    if config.engine.stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    held = HfDeepSpeedConfig(deepspeed_config(config, world.world_size))  # known while it is referred to
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del held


@contextmanager
def gathered(parameters: Sequence[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Whole parameters inside, where ZeRO 3 has split them; with write, what rank 0 leaves in them is everyone's."""
    split = [parameter for parameter in parameters if is_split(parameter)]
    if not split:
        yield
        return
    from tunesmith.train.zero.deepspeed import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def read_by(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Under ZeRO 3, has other modules' parameters gathered while this one's forward and backward run, and let go after.

    For a forward that reads them without calling the modules they belong to. Before the engine is made, or after.
    """
    from tunesmith.train.zero.deepspeed import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def is_split(parameter: torch.Tensor) -> bool:
    """True where ZeRO 3 holds the parameter in parts."""
    return hasattr(parameter, "ds_id")


def is_replicated(parameter: nn.Parameter) -> bool:
    """True where every rank holds the whole parameter: all, but for those that ZeRO 3 splits (small ones it keeps)."""
    return not is_split(parameter) or bool(parameter.ds_persist)  # type: ignore[attr-defined]


def local_part(parameter: nn.Parameter) -> torch.Tensor | None:
    """What this rank always holds of a parameter: all of it, or its part under ZeRO 3; None where that is on a disk."""
    if not is_split(parameter):
        return parameter.detach()
    part: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return part.detach() if part.status.name == "AVAILABLE" else None  # type: ignore[attr-defined]


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, also where this rank holds a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_part(parameter: nn.Parameter, world: World) -> tuple[int, torch.Tensor]:
    """This rank's share of a parameter's elements, flat, and the position at which it begins: the shares of all ranks
    are the whole, once. Every rank must ask at the same time.
    """
    if not is_split(parameter):
        return _share(parameter, world)
    held = parameter.ds_tensor  # type: ignore[attr-defined]
    if held.status.name != "AVAILABLE":  # on an NVMe disk
        with gathered([parameter]):
            start, part = _share(parameter, world)
            return start, part.clone()
    whole, share = int(parameter.ds_numel), held.numel()  # type: ignore[attr-defined]
    start = min(world.rank * share, whole)
    return start, held.detach().reshape(-1)[: max(0, whole - start)]


def _share(parameter: nn.Parameter, world: World) -> tuple[int, torch.Tensor]:
    flat = parameter.detach().reshape(-1)
    size = -(-flat.numel() // world.world_size)
    start = min(world.rank * size, flat.numel())
    return start, flat[start : start + size]
