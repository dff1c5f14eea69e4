"""Reading safetensors into a model that is split over the ranks, a few tensors at a time."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from tunesmith.train.config.config import ModelConfig
from tunesmith.train.errors import ModelError
from tunesmith.train.model.conversion import Conversion, plan_reading
from tunesmith.train.paths import resolve_path
from tunesmith.train.zero.sharding import full_shape, gathered, is_split


def weight_files(settings: ModelConfig) -> list[Path]:
    """The safetensors files of a folder or hub id, downloaded where needed. Raises ModelError when there are none."""
    name = resolve_path(settings.name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=settings.revision, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if not files or absent:
        raise ModelError(
            f"{settings.name_or_path} lacks {', '.join(absent) or 'weights in safetensors'}.",
            at="model.name_or_path",
            do="use a checkpoint with model.safetensors, or set model.random_weights=true to start from nothing.",
        )
    return files


@torch.no_grad()
def load_weights(model: Any, files: list[Path], name: str) -> None:
    """Fills every parameter and persistent buffer: rank 0 reads a tensor, or those that become one, and all ranks take
    their part of it. The names may be the published ones, as from_pretrained() takes them.

    Raises ModelError when a weight is absent or has another shape.
    """
    with contextlib.ExitStack() as opened:
        places: dict[str, Any] = {}
        for path in files:
            file = opened.enter_context(_open(path))
            places |= dict.fromkeys(file.keys(), file)
        plan = [(conversion, _shapes(conversion, model, places)) for conversion in plan_reading(model, places)]
        wanted = _wanted(model, {key for _, shapes in plan for key in shapes}, name)
        for conversion, shapes in plan:
            mine = {key: shape for key, shape in shapes.items() if key in wanted}
            for key, shape in mine.items():
                _check_shape(shape, wanted[key], key, conversion.names)
            if mine:
                _fill_together(model, conversion, {key: wanted[key] for key in mine}, places)


def _wanted(model: Any, made: set[str], name: str) -> dict[str, torch.Tensor]:
    """What the model holds, each once, by a name that the files have. Raises ModelError when they lack one."""
    persistent, optional = set(model.state_dict()), model._keys_to_ignore_on_load_missing or ()
    held = list(model.named_parameters(remove_duplicate=False))
    held += [(key, buffer) for key, buffer in model.named_buffers() if key in persistent]
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for key, tensor in held:
        if key in made:
            found.setdefault(id(tensor), (key, tensor))  # of tied ones, the first name
    absent = [key for key, tensor in held if id(tensor) not in found and not any(re.search(it, key) for it in optional)]
    if absent:
        raise ModelError(
            f"{absent[0]} is not in the weights of {name}.", at="model.name_or_path", do="use a complete checkpoint."
        )
    return dict(found.values())


def _shapes(conversion: Conversion, model: nn.Module, places: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What will come out of a conversion; nothing but the heads of files is read."""

    def read(stored: str) -> torch.Tensor:
        return torch.empty(places[stored].get_slice(stored).get_shape(), device="meta")

    try:
        return {key: tuple(tensor.shape) for key, tensor in conversion.run(model, read).items()}
    except (RuntimeError, ValueError) as error:  # experts of different shapes
        raise ModelError(
            f"{_listed(conversion.names)} do not go together: {' '.join(str(error).split())[:200]}",
            at="model.name_or_path",
            do="get the files anew.",
        ) from None


def _fill_together(
    model: nn.Module, conversion: Conversion, targets: dict[str, torch.Tensor], places: dict[str, Any]
) -> None:
    reads = not all(is_split(target) for target in targets.values()) or dist.get_rank() == 0
    made = conversion.run(model, lambda stored: places[stored].get_tensor(stored)) if reads else {}
    for key, target in targets.items():
        with gathered([target], write=True):
            if key in made:
                target.copy_(made.pop(key))


@torch.no_grad()
def fill(parameter: nn.Parameter, file_path: Path, stored: str) -> None:
    """One parameter from one tensor of a file; where it is split, rank 0 reads and every rank keeps its part.

    Raises ModelError when the shapes differ.
    """
    with safe_open(file_path, framework="pt") as file:
        _check_shape(tuple(file.get_slice(stored).get_shape()), parameter, stored, [stored])
        with gathered([parameter], write=True):
            if not is_split(parameter) or dist.get_rank() == 0:
                parameter.copy_(file.get_tensor(stored))


def _check_shape(shape: tuple[int, ...], target: torch.Tensor, key: str, stored: list[str]) -> None:
    if shape != full_shape(target):
        raise ModelError(
            f"{key} has shape {list(shape)}; the model wants {list(full_shape(target))}.",
            at=_listed(stored),
            do="use weights that belong to this config.json.",
        )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, {names[0]} to {names[-1]}"


def _open(file_path: Path) -> Any:
    try:
        return safe_open(file_path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file_path.name} can't be read: {error}", at=str(file_path), do="get the file anew."
        ) from None
