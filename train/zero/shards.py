"""A checkpoint's shards made whole: one safetensors file per trained parameter, for any number of ranks and ZeRO stage.

    python -m tunesmith.train.zero.shards <folder of DeepSpeed's files> <new folder>

<new folder>/
    index.json              parameters in their optimizer groups, with shape, file and number of updates; loss scale;
                            counters; a digest of every file
    00000.safetensors ...   `weights` of one parameter and what its optimizer keeps beside them (exp_avg, ...), fp32
    buffers.safetensors     persistent buffers, where the model has some

It does not import DeepSpeed, holds one parameter at a time, reads shards through a list of allowed types, and is
staged: the folder gets its name when everything is in it. DeepSpeed's own converter (0.19.8) has no way from stage 2
to 3 or to and from stage 0, leaves persistent buffers behind, runs whatever code its files name, and loads every
group with the first one's settings under stage 3.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.train.files.durable import digest_of, replace, sync_file, write_json
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import plan_faults, reach

FORMAT = 1
INDEX = "index.json"
BUFFERS = "buffers.safetensors"
LOCK = "lock"
SPARE_BYTES = 64 * 2**20
SHARD_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


class StandIn:
    """Stands in for a type of DeepSpeed's in its files: takes the fields, runs none of its code."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class FragmentAddress(StandIn):
    """Where a rank's part of a parameter lies in its flat tensor."""

    start: int
    numel: int


class Stage(StandIn): ...


class Scaler(StandIn): ...


class DynamicScaler(StandIn): ...


# All that DeepSpeed 0.19.8 puts into a checkpoint beside plain values and tensors, which torch loads anyway: what
# stands in for each type where DeepSpeed is not imported, and its name.
ALLOWED: Sequence[tuple[Callable[..., Any], str]] = (
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Scaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)


@dataclass
class WholeParameter:
    """A parameter with what its optimizer knows of it, flat, in fp32. updates is None before the first one."""

    name: str
    shape: tuple[int, ...]
    group: int
    updates: float | None
    tensors: dict[str, Tensor]


@dataclass
class Shards:
    """What all ranks wrote of one checkpoint, mapped into memory and read as it is asked for."""

    model: dict[str, Any]
    optimizers: list[dict[str, Any]] = field(default_factory=list)  # of each rank; none at stage 0

    @classmethod
    def open(cls, folder: Path) -> "Shards":
        ranked = sorted((int(m[1]), path) for path in folder.iterdir() if (m := SHARD_RANK.search(path.name)))
        if [rank for rank, _ in ranked] != list(range(len(ranked))):
            raise ValueError(f"{folder} lacks the optimizer shards of some ranks")
        model = read(first_model_file(folder))
        if ranked and len(ranked) != model["dp_world_size"]:
            raise ValueError(f"{len(ranked)} optimizer shards of {model['dp_world_size']} ranks are in {folder}")
        return cls(model, [read(path)["optimizer_state_dict"] for _, path in ranked])

    def parameters(self) -> Iterator[WholeParameter]:
        if not self.optimizers:
            return self._replicated()
        return self._by_parameter() if "fp32_flat_groups" in self.optimizers[0] else self._by_flat_group()

    def _replicated(self) -> Iterator[WholeParameter]:
        """Stage 0: torch's own state, numbered through the groups, whose names Engine.save() wrote beside it."""
        optimizer = self.model["optimizer"]
        state = optimizer.get("optimizer_state_dict", optimizer)["state"]
        masters = optimizer.get("fp32_groups")  # under bf16; the weights themselves under fp32
        number = 0
        for group, names in enumerate(self.model["parameter_groups"]):
            for address, name in enumerate(names):
                weights = masters[group][address] if masters else self.model["module"][name]
                found = state.get(number, {})
                tensors = {"weights": weights.detach().reshape(-1)} | _moments(found)
                yield WholeParameter(name, tuple(weights.shape), group, _updates(found), tensors)
                number += 1

    def _by_flat_group(self) -> Iterator[WholeParameter]:
        """Stages 1 and 2: each group is one flat tensor cut into ranks, wherever that cuts a parameter."""
        for group, shapes in enumerate(self.model["param_shapes"]):
            states = [shard["base_optimizer_state"]["state"].get(group, {}) for shard in self.optimizers]
            masters = [shard["single_partition_of_fp32_groups"][group] for shard in self.optimizers]
            addresses = [shard["param_slice_mappings"][group] for shard in self.optimizers]
            for name, shape in shapes.items():
                tensors = {}
                for key, flats in _by_key(masters, states):
                    parts = [(flat, held[name]) for flat, held in zip(flats, addresses, strict=True) if name in held]
                    tensors[key] = torch.cat([flat.narrow(0, part.start, part.numel) for flat, part in parts])
                yield WholeParameter(name, tuple(shape), group, _updates(states[0]), tensors)

    def _by_parameter(self) -> Iterator[WholeParameter]:
        """Stage 3: each parameter is cut into as many equal parts as there are ranks, the last ones padded."""
        saved = [shard["optimizer_state_dict"] for shard in self.optimizers]
        group_of = {k: group for group, found in enumerate(saved[0]["param_groups"]) for k in found["params"]}
        for sub_group, shapes in enumerate(self.model["param_shapes"]):
            states = [shard["state"].get(sub_group, {}) for shard in saved]
            masters = [shard["fp32_flat_groups"][sub_group] for shard in self.optimizers]
            start = 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                part = -(-numel // len(self.optimizers))
                tensors = {
                    key: torch.cat([flat.narrow(0, start, part) for flat in flats])[:numel]
                    for key, flats in _by_key(masters, states)
                }
                yield WholeParameter(name, tuple(shape), group_of[sub_group], _updates(states[0]), tensors)
                start += part

    def buffers(self) -> dict[str, Tensor]:
        names = set(self.model["buffer_names"])
        return {name: tensor.contiguous() for name, tensor in self.model["module"].items() if name in names}

    def loss_scale(self) -> dict[str, float | int | bool]:
        """The dynamic loss scaler's fields; empty where there is none (fp32 and bf16)."""
        scaler = self.optimizers[0].get("loss_scaler") if self.optimizers else None
        fields = vars(scaler) if isinstance(scaler, DynamicScaler) else {}
        return {name: value for name, value in fields.items() if isinstance(value, float | int)}


def read(path: Path) -> dict[str, Any]:
    """One of DeepSpeed's files, mapped into memory. Any type that is not in ALLOWED is refused, not run."""
    with torch.serialization.safe_globals(list(ALLOWED)):
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if foreign:
            raise ValueError(f"{path.name} holds {', '.join(foreign)}, which could run code; nothing of it was run")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def first_model_file(folder: Path) -> Path:
    """The model file of rank 0, which names shapes, buffers and counters."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no model file")


def _by_key(masters: list[Tensor], states: list[dict[str, Any]]) -> Iterator[tuple[str, list[Tensor]]]:
    """The flat tensors of all ranks, by what they hold."""
    yield "weights", [flat.detach() for flat in masters]
    for key in _moments(states[0]):
        if all(key in state for state in states):
            yield key, [state[key] for state in states]


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """What an optimizer keeps of each weight: every tensor of its state that is no single number."""
    return {key: value.reshape(-1) for key, value in state.items() if isinstance(value, Tensor) and value.dim()}


def _updates(state: dict[str, Any]) -> float | None:
    return float(state.get("step", 0)) if state else None  # an optimizer that does not count has a state all the same


def convert(source: Path, target: Path) -> None:
    """Makes the target, unless it is there and whole. Raises OSError, ValueError and what torch.load raises."""
    if target.is_dir():
        if is_whole(target):
            return
        shutil.rmtree(target)
    staged = target.with_name(f"{target.name}.staged-{os.getpid()}")
    staged.mkdir(parents=True)
    try:
        with FileLock(staged / LOCK):
            _check_space(source, staged)
            write_json(staged / INDEX, _write(Shards.open(source), staged))
            (staged / LOCK).unlink(missing_ok=True)
            replace(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def is_at_work(folder: Path) -> bool:
    """True while a process is converting into this staged folder; false once it has ended, however it did."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def is_whole(folder: Path) -> bool:
    """True when every file has the digest of the index."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return index["format"] == FORMAT and all(
            digest_of(folder / name).sha256 == expected for name, expected in index["digests"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(shards: Shards, folder: Path) -> dict[str, Any]:
    """Every file but the index, which it returns."""
    parameters, digests, parent = dict[str, Any](), dict[str, str](), os.getppid()
    for number, parameter in enumerate(shards.parameters()):
        reach(Phase.converting, number)  # this process does no steps: a fault is planned by the parameter
        if os.getppid() != parent:
            raise ValueError("the run that asked for it has ended")
        _check_whole(parameter)
        file = f"{number:05d}.safetensors"
        tensors = {key: tensor.float().contiguous() for key, tensor in parameter.tensors.items()}
        digests[file] = _save(tensors, folder / file)
        parameters[parameter.name] = {
            "file": file,
            "shape": parameter.shape,
            "group": parameter.group,
            "updates": parameter.updates,
        }
    if buffers := shards.buffers():
        digests[BUFFERS] = _save(buffers, folder / BUFFERS)
    return {
        "format": FORMAT,
        "parameters": parameters,
        "digests": digests,
        "loss_scale": shards.loss_scale(),
        "counters": {name: shards.model[name] for name in ("global_steps", "global_samples", "skipped_steps")},
    }


def _check_whole(parameter: WholeParameter) -> None:
    numel = math.prod(parameter.shape)
    for key, tensor in parameter.tensors.items():
        if tensor.numel() != numel:
            raise ValueError(f"the shards hold {tensor.numel()} of the {numel} numbers of {parameter.name} ({key})")


def _check_space(source: Path, folder: Path) -> None:
    needed = SPARE_BYTES + sum(file.stat().st_size for file in source.iterdir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it needs {needed / 2**30:.2g} GiB of disk, and {free / 2**30:.2g} GiB are free")


def _save(tensors: dict[str, Tensor], path: Path) -> str:
    save_file(tensors, path)
    return sync_file(path).sha256


def main(source: str, target: str) -> int:
    """The command: 0, or 1 with one line on stderr."""
    plan_faults()
    try:
        convert(Path(source), Path(target))
    except Exception as error:  # whatever it is, rank 0 reads why in one line
        reason = " ".join(str(error).split()) or type(error).__name__
        print(reason[:400], file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
