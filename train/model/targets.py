"""Which matrices of a model LoRA adapts: found in the live model, and named so that PEFT adapts just these.

all-linear means every matrix but embeddings, output head and routers, in every family: linear layers, and experts that
are held as one parameter of three dimensions, which PEFT's own all-linear leaves out or takes with the router
(0.21.2, convert_peft_config_for_transformers).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.train.config.config import AdapterConfig
from tunesmith.train.config.schema.adapter import ALL_LINEAR
from tunesmith.train.errors import ModelError
from tunesmith.train.zero.sharding import full_shape


@dataclass
class Targets:
    """Full names of what LoRA adapts: modules, and parameters of modules that PEFT knows no layer for."""

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def find_targets(model: Any, adapter: AdapterConfig) -> Targets:
    """What adapter.target_modules means in this model. Raises ModelError for a name that is not there."""
    wanted = adapter.target_modules
    names = [wanted] if isinstance(wanted, str) and wanted != ALL_LINEAR else wanted
    found, absent = Targets(), []
    if wanted == ALL_LINEAR:
        _add_every_matrix(found, model)
    else:
        absent = [name for name in names if not _add_named(found, model, name)]
    if absent:
        every = Targets()
        _add_every_matrix(every, model)
        there = sorted({name.rpartition(".")[-1] for name in every.modules + every.parameters})
        raise ModelError(
            f"the model has no module {', '.join(absent)} for LoRA.",
            at="adapter.target_modules",
            do=f"correct the name (found: {', '.join(there)}), or set adapter.target_modules={ALL_LINEAR}.",
        )
    renamed = [name for name in found.modules if _is_renamed(name.rpartition(".")[-1], model)]
    found.modules = [name for name in found.modules if name not in renamed]
    found.parameters += [f"{name}.weight" for name in renamed]
    return found


def _add_every_matrix(found: Targets, model: Any) -> None:
    left_out = {model.get_output_embeddings(), *_routers(model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module not in left_out:
            found.modules.append(name)
        found.parameters += [f"{name}.{key}" for key in expert_parameters(module)]


def _add_named(found: Targets, model: nn.Module, wanted: str) -> bool:
    """Modules that end on a name, parameters that do, and those of a module for which PEFT has no layer."""
    before = len(found.modules) + len(found.parameters)
    for name, module in model.named_modules():
        own = expert_parameters(module) or _matrix_parameters(module)
        if not f".{name}".endswith(f".{wanted}"):
            found.parameters += [f"{name}.{key}" for key in own if f".{name}.{key}".endswith(f".{wanted}")]
        elif _is_known(module):
            found.modules.append(name)
        else:
            found.parameters += [f"{name}.{key}" for key in own]
    return len(found.modules) + len(found.parameters) > before


def _is_known(module: nn.Module) -> bool:
    """Whether it is one of torch's layers, or the one that GPT-2 has for them."""
    kinds = (kind for kind in type(module).__mro__ if kind is not nn.Module)
    return isinstance(module, Conv1D) or any(kind.__module__.startswith("torch.nn.") for kind in kinds)


def expert_parameters(module: nn.Module) -> list[str]:
    """A module's own parameters of three dimensions, [experts, ., .]: a matrix an expert."""
    if _is_known(module):
        return []
    shapes = {key: full_shape(parameter) for key, parameter in module.named_parameters(recurse=False)}
    return [key for key, shape in shapes.items() if len(shape) == 3 and min(shape[1:]) > 1]


def _matrix_parameters(module: nn.Module) -> list[str]:
    if _is_known(module):
        return []
    return [key for key, parameter in module.named_parameters(recurse=False) if len(full_shape(parameter)) == 2]


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers that share a block with experts and have one output for each of them, or one in all: they decide
    which experts a token goes to, and how much a shared one counts.
    """
    for block in model.modules():
        experts = {child: count for child in block.children() if (count := _num_experts(child))}
        inside = {module for child in experts for module in child.modules()}
        for module in block.modules() if experts else ():
            if isinstance(module, nn.Linear) and module not in inside:
                outputs = full_shape(module.weight)[0]
                if outputs == 1 or outputs in experts.values():
                    yield module


def _num_experts(module: nn.Module) -> int:
    """Of a module that holds them, 0 of another."""
    own = expert_parameters(module)
    return full_shape(getattr(module, own[0]))[0] if own else 0


def _is_renamed(leaf: str, model: nn.Module) -> bool:
    """Whether PEFT takes a layer's name for the one that an expert's matrix had before transformers 5, and would adapt
    the experts in its place. Such a layer is named by its weight, which comes to the same.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    asked = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(asked, model=model, conversions=None)
    except ValueError:  # it would want gate_proj and up_proj together
        return True
    return bool(asked.target_parameters)


def shortest_names(wanted: Iterable[str], every: Iterable[str]) -> list[str]:
    """Ends of names that fit the wanted ones and no other, as PEFT matches them."""
    wanted = set(wanted)
    others = {end for name in set(every) - wanted for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in wanted})


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
