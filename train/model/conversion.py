"""Names and shapes of a published checkpoint, and those of the model that transformers makes of it.

Mixtures of experts are published with a tensor an expert, and transformers 5 fuses those of a layer while it loads
(transformers/conversion_mapping.py). Here the same conversions are planned first, from names alone, and then done for
one group of tensors at a time, so that no rank ever holds the whole model.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass
class Conversion:
    """Tensors that are read together, and what becomes of them."""

    target: str  # the first name that comes out
    transform: WeightConverter | None  # None: another name at most
    sources: list[tuple[str, str]] = field(default_factory=list)  # which of the transform's patterns, and the name

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.sources]

    def run(self, model: nn.Module, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that come out, by name, of those that `read` gives."""
        if self.transform is None:
            return {self.target: read(self.names[0])}
        transform = deepcopy(self.transform)
        for pattern, name in self.sources:
            transform.add_tensor(self.target, name, pattern, read(name))
        made = transform.convert(self.target, model=model, config=model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}


class _Transforms:
    """transformers' list of them, as the functions that apply them want it."""

    def __init__(self, transforms: list[Any]) -> None:
        self.renamings = [it for it in transforms if isinstance(it, WeightRenaming)]
        self.converters = [it for it in transforms if isinstance(it, WeightConverter)]
        self._of_pattern = {pattern: it for it in self.converters for pattern in it.source_patterns}

    def add(self, plan: dict[str, Conversion], name: str, target: str, pattern: str | None) -> None:
        converter = self._of_pattern[pattern] if pattern is not None else None
        plan.setdefault(target, Conversion(target, converter)).sources.append((pattern or name, name))


def plan_reading(model: Any, stored: Iterable[str]) -> list[Conversion]:
    """How the tensors of these names in files become those of the model; names it has no use for are left out.

    The model remembers the conversions that were needed, for when it is written. As in transformers 5.23
    (convert_and_load_state_dict_in_model), which reads all tensors at once.
    """
    known = get_model_conversion_mapping(model)
    transforms, state, prefix = _Transforms(known), model.state_dict(), model.base_model_prefix
    plan: dict[str, Conversion] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, transforms.renamings, transforms.converters, prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target in state:
            transforms.add(plan, name, target, pattern)
    model._weight_conversions = [it for it in known if it.was_used()]
    return list(plan.values())


class Publishing:
    """Takes a model's tensors one by one, and gives them as they are published: the opposite of plan_reading()."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self._model = model
        self._transforms = _Transforms([it.reverse_transform() for it in reversed(_conversions_of(model))])
        plan: dict[str, Conversion] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, [], self._transforms.converters)
            self._transforms.add(plan, name, target if pattern else self._renamed(name), pattern)
        self._of_name = {name: conversion for conversion in plan.values() for name in conversion.names}
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The published tensors that this was the last part of, by their names; none while parts are missing."""
        conversion = self._of_name[name]
        self._held[name] = tensor
        if not all(part in self._held for part in conversion.names):
            return {}
        made = conversion.run(self._model, self._held.pop)
        if conversion.transform is None:
            return made
        return {self._renamed(name): tensor for name, tensor in made.items()}

    def _renamed(self, name: str) -> str:
        renamed: str = rename_source_key(name, self._transforms.renamings, [])[0]
        return renamed


def _conversions_of(model: Any) -> list[Any]:
    """Those that a model was read with; of one made from its config alone, those that its published form needs."""
    used: list[Any] | None = getattr(model, "_weight_conversions", None)
    if used is not None:
        return used
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [it for it in known if not isinstance(it, PrefixChange)]
