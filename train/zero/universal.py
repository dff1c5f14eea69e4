"""A checkpoint of another world size or ZeRO stage, loaded from its whole parameters (see shards.py).

Each rank reads the parts that its own optimizer holds, puts them where DeepSpeed keeps them, and lets DeepSpeed bring
the weights of the forward up to date from the fp32 ones.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunesmith.train.config.config import Config, Precision
from tunesmith.train.errors import TrainingError
from tunesmith.train.zero.deepspeed_config import zero_stage
from tunesmith.train.zero.shards import BUFFERS, INDEX


def layout(config: Config, world_size: int) -> dict[str, object]:
    """All that decides how an engine's files are cut: where two are equal, DeepSpeed loads them as they are."""
    engine, stage = config.engine, zero_stage(config.engine)
    accumulation = config.batch.gradient_accumulation_steps(world_size)
    raw = engine.deepspeed.get("zero_optimization", {})
    return {
        "stage": stage,
        "world_size": world_size if stage else 1,  # without ZeRO every rank holds everything
        "precision": str(engine.precision),
        # under bf16, stage 1 is another optimizer of DeepSpeed's when it adds up several micro batches
        "accumulates": engine.precision is Precision.bf16 and stage == 1 and accumulation > 1,
        "offload_optimizer": str(engine.offload_optimizer),
        "sub_group_size": raw.get("sub_group_size") if stage == 3 else None,
        "round_robin_gradients": bool(raw.get("round_robin_gradients")),
    }


class WholeState:
    """What a conversion left in a folder."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.folder = folder
        self.parameters: dict[str, dict[str, Any]] = index["parameters"]
        self.loss_scale: dict[str, Any] = index["loss_scale"]
        self.counters: dict[str, int] = index["counters"]

    @cached_property
    def moments(self) -> list[str]:
        """What the optimizer keeps of each weight, by name; none before the first update."""
        updated = [found["file"] for found in self.parameters.values() if found["updates"] is not None]
        if not updated:
            return []
        with safe_open(self.folder / updated[0], framework="pt") as file:
            return sorted(set(file.keys()) - {"weights"})

    def part(self, name: str, key: str, start: int, numel: int) -> Tensor | None:
        """Numbers start to start + numel of a parameter's weights or moment; None for a moment it has not yet."""
        with safe_open(self.folder / self.parameters[name]["file"], framework="pt") as file:
            return file.get_slice(key)[start : start + numel] if key in file.keys() else None  # noqa: SIM118

    def updates(self, tensor: "OptimizerTensor") -> set[float]:
        """How often what is in a tensor has been updated; as its group was where a rank holds nothing but padding."""
        found = [self.parameters[fragment.name] for fragment in tensor.fragments]
        rest = [parameter for parameter in self.parameters.values() if parameter["group"] == tensor.group]
        return {parameter["updates"] for parameter in found or rest} - {None}

    def buffers(self) -> dict[str, Tensor]:
        if not (self.folder / BUFFERS).is_file():
            return {}
        with safe_open(self.folder / BUFFERS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@dataclass
class Fragment:
    """numel numbers of a parameter from `start` on, which lie from `at` on in a rank's flat tensor."""

    name: str
    start: int
    numel: int
    at: int


@dataclass
class OptimizerTensor:
    """A tensor of fp32 weights that this rank's optimizer updates, and what it is made of."""

    weights: Tensor  # the optimizer's state hangs on it
    group: int
    fragments: list[Fragment]


StateOf = Callable[[Any, Tensor, float, dict[str, Tensor]], dict[str, Any]]


def load(engine: Any, folder: Path, group_names: list[list[str]], state_of: StateOf) -> None:
    """Into a new DeepSpeed engine. Every rank calls it; raises TrainingError where the checkpoint does not fit.

    state_of: (optimizer, weights, updates, moments) -> what the optimizer keeps of weights that were updated so often.
    """
    whole = WholeState(folder)
    _check_names(whole, group_names, folder)
    optimizer, names = engine.optimizer, {id(p): name for name, p in engine.module.named_parameters()}
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise TrainingError(
            "a checkpoint cannot be loaded on another number of ranks, or at another stage, with state on NVMe.",
            at="engine.offload_optimizer, engine.offload_weights",
            do="go on with the ranks and the stage it was saved with, or offload to the cpu.",
        )
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    base = engine.basic_optimizer
    with torch.no_grad():
        for tensor in optimizer_tensors(optimizer, names):
            _fill(tensor, base, whole, state_of)
        _refresh_weights(optimizer)
        _load_buffers(engine.module, whole.buffers())
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    _set_loss_scale(optimizer, whole.loss_scale)
    for name, value in whole.counters.items():
        setattr(engine, name, value)


def _check_names(whole: WholeState, group_names: list[list[str]], folder: Path) -> None:
    """The checkpoint holds exactly the parameters that are trained, each in its group."""
    saved = {name: found["group"] for name, found in whole.parameters.items()}
    wanted = {name: group for group, names in enumerate(group_names) for name in names}
    if saved == wanted:
        return
    other = sorted(saved.items() ^ wanted.items())
    raise TrainingError(
        f"the checkpoint trains other parameters, or in other groups: {other[0][0]} and {len(other) - 1} more.",
        at=str(folder),
        do="resume with the model and the adapter it was saved with.",
    )


def optimizer_tensors(optimizer: Any, names: dict[int, str]) -> Iterator[OptimizerTensor]:
    """Every tensor that this rank's optimizer updates, wherever this kind of DeepSpeed's optimizers keeps it."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _of_stage_3(optimizer, names)
    if hasattr(optimizer, "bit16_groups"):
        return _of_flat_groups(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    if hasattr(optimizer, "bf16_groups"):
        return _of_flat_groups(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    if hasattr(optimizer, "fp32_groups"):
        return _of_copies(optimizer.fp16_groups, optimizer.fp32_groups, names)
    groups = [group["params"] for group in optimizer.param_groups]
    return _of_copies(groups, groups, names)


def _of_stage_3(optimizer: Any, names: dict[int, str]) -> Iterator[OptimizerTensor]:
    """A parameter is cut into equal parts, the last ones padded; a rank's parts of a sub-group are one tensor."""
    rank = torch.distributed.get_rank(group=optimizer.dp_process_group)
    for sub_group, parameters in enumerate(optimizer.fp16_groups):
        fragments, at = [], 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = rank * size
            numel = max(0, min(size, parameter.ds_numel - start))
            if numel:
                fragments.append(Fragment(names[id(parameter)], start, numel, at))
            at += size
        yield OptimizerTensor(
            optimizer.fp32_partitioned_groups_flat[sub_group], optimizer.sub_group_to_group_id[sub_group], fragments
        )


def _of_flat_groups(
    groups: list[list[nn.Parameter]], flats: list[Tensor], names: dict[int, str]
) -> Iterator[OptimizerTensor]:
    """Stages 1 and 2: a rank's part of a group is one tensor, with all, a part or nothing of each parameter."""
    for group, (parameters, flat) in enumerate(zip(groups, flats, strict=True)):
        fragments = []
        for parameter in parameters:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                of, at = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(Fragment(names[id(parameter)], of.start, of.numel, at.start))
        yield OptimizerTensor(flat, group, fragments)


def _of_copies(
    groups: list[list[nn.Parameter]], masters: list[list[Tensor]], names: dict[int, str]
) -> Iterator[OptimizerTensor]:
    """Stage 0: every rank holds each parameter whole; the master is the parameter itself under fp32."""
    for group, (parameters, copies) in enumerate(zip(groups, masters, strict=True)):
        for parameter, master in zip(parameters, copies, strict=True):
            yield OptimizerTensor(master, group, [Fragment(names[id(parameter)], 0, parameter.numel(), 0)])


def _fill(tensor: OptimizerTensor, base: Any, whole: WholeState, state_of: StateOf) -> None:
    """Weights, moments and number of updates of one tensor; what pads it stays 0."""
    _copy(tensor.weights, tensor.fragments, "weights", whole)
    updates = whole.updates(tensor)
    if not updates:
        return
    if len(updates) > 1:
        raise TrainingError(
            f"parameters that this engine updates together have been updated {sorted(updates)} times.",
            at=str(whole.folder),
            do="resume at the stage it was saved with.",
        )
    moments = {key: torch.zeros_like(tensor.weights).detach() for key in whole.moments}
    for key, moment in moments.items():
        _copy(moment, tensor.fragments, key, whole)
    base.state[tensor.weights] = state_of(base, tensor.weights, updates.pop(), moments)


def _copy(tensor: Tensor, fragments: list[Fragment], key: str, whole: WholeState) -> None:
    assert tensor.is_contiguous()
    flat = tensor.detach().view(-1)
    for fragment in fragments:
        numbers = whole.part(fragment.name, key, fragment.start, fragment.numel)
        if numbers is not None:
            flat.narrow(0, fragment.at, fragment.numel).copy_(numbers)


def _refresh_weights(optimizer: Any) -> None:
    """The weights that the forward reads, from the fp32 ones."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for sub_group, fp32 in enumerate(optimizer.fp32_partitioned_groups_flat):
            flat, parameters = (
                optimizer.fp16_partitioned_groups_flat[sub_group],
                optimizer.fp16_partitioned_groups[sub_group],
            )
            flat.copy_(fp32)
            for held, part in zip(parameters, optimizer.unflatten(flat, parameters), strict=True):
                held.data = part.data
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)


def _load_buffers(module: nn.Module, saved: dict[str, Tensor]) -> None:
    buffers = dict(module.named_buffers())
    for name, tensor in saved.items():
        buffers[name].copy_(tensor)


def _set_loss_scale(optimizer: Any, saved: dict[str, Any]) -> None:
    scaler = getattr(optimizer, "loss_scaler", None)
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
