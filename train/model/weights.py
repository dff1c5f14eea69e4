"""Reading safetensors into a model that is split over the ranks, one tensor at a time."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from tunesmith.train.config.config import ModelConfig
from tunesmith.train.errors import ModelError
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


def load_weights(model: nn.Module, files: list[Path], name: str) -> None:
    """Fills every parameter and persistent buffer: rank 0 reads a tensor, all ranks take their part of it.

    Raises ModelError when a weight is absent or has another shape.
    """
    places = {key: file for file in files for key in _keys(file)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    persistent = set(model.state_dict())
    for key, parameter in model.named_parameters():
        stored = _stored_name(key, places, prefix)
        if stored is None:
            raise ModelError(
                f"{key} is not in the weights of {name}.",
                at="model.name_or_path",
                do="use engine=zero2 (transformers converts the names there) or a complete checkpoint.",
            )
        fill(parameter, places[stored], stored)
    for key, buffer in model.named_buffers():
        stored = _stored_name(key, places, prefix)
        if key in persistent and stored is not None:
            with safe_open(places[stored], framework="pt") as file:
                buffer.copy_(file.get_tensor(stored))


@torch.no_grad()
def fill(parameter: nn.Parameter, file_path: Path, stored: str) -> None:
    """One parameter from one tensor of a file; where it is split, rank 0 reads and every rank keeps its part.

    Raises ModelError when the shapes differ.
    """
    with safe_open(file_path, framework="pt") as file:
        shape = tuple(file.get_slice(stored).get_shape())
        if shape != full_shape(parameter):
            raise ModelError(
                f"{stored} has shape {list(shape)}; the model wants {list(full_shape(parameter))}.", at=str(file_path)
            )
        with gathered([parameter], write=True):
            if not is_split(parameter) or dist.get_rank() == 0:
                parameter.copy_(file.get_tensor(stored))


def _keys(file_path: Path) -> list[str]:
    try:
        with safe_open(file_path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file_path.name} can't be read: {error}", at=str(file_path), do="get the file anew."
        ) from None


def _stored_name(key: str, places: dict[str, Path], prefix: str) -> str | None:
    """The name in the files: the model's own, or without the base model's prefix, as in GPT-2's."""
    if key in places:
        return key
    short = key.removeprefix(prefix)
    return short if short in places else None
