"""Which run a checkpoint is of: named values that must agree, and a digest of the weights that it leaves out."""

import hashlib
import json
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from tunesmith.train.checkpoint.find import OWNER
from tunesmith.train.config.config import AdapterKind, Config
from tunesmith.train.config.override_text import typed
from tunesmith.train.config.suggest import did_you_mean, nearest
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.files.manifest import Identity, plain
from tunesmith.train.ranks.distributed import World, sum_over_ranks
from tunesmith.train.zero import universal
from tunesmith.train.zero.sharding import full_shape, own_part

BASE_WEIGHTS = "base_weights"
BLOCK = 1 << 20  # elements that are multiplied at once: 24 MiB of int64 beside the weights
# Settings of these groups that change no weight, and so may change between two parts of a run.
FREE = {f"optimizer.{name}" for name in ("max_skipped_steps", "on_spike", "spike_sigma", "max_rollbacks")}
NOTED = {"schedule.epochs", "schedule.max_steps"}  # a finished run is extended by them
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes


def identity(config: Config, world: World, data: str, parts: dict[str, str]) -> Identity:
    """What can be said before the model is loaded; base_weights come later. data: its fingerprint, made of parts."""
    groups = {"adapter": config.adapter, "objective": config.objective, "optimizer": config.optimizer}
    values: dict[str, Any] = {
        "data": data,
        "seed": config.seed,
        "engine.precision": config.engine.precision,
        "model.router_aux_loss_coef": config.model.router_aux_loss_coef,
        **{f"batch.{name}": value for name, value in asdict(config.batch).items() if name != "micro_batch_size"},
    }
    if config.adapter.kind is AdapterKind.none:
        values |= {"model.name_or_path": config.model.name_or_path, "model.revision": config.model.revision}
    for group, settings in [*groups.items(), ("schedule", config.schedule)]:
        values |= {f"{group}.{name}": value for name, value in asdict(settings).items()}  # type: ignore[call-overload]
    return Identity(
        fingerprint=plain({name: value for name, value in values.items() if name not in FREE | NOTED}),
        noted=plain({name: values[name] for name in sorted(NOTED)}),
        world_size=world.world_size,
        layout=plain(universal.layout(config, world.world_size)),
        data=parts,
    )


def of_finished(config: Config, world: World, data: str, parts: dict[str, str]) -> Identity:
    """As identity(), for summary.json: the base model by its name, which is compared without loading any weights."""
    current = identity(config, world, data, parts)
    if config.adapter.kind is AdapterKind.none:
        return current
    base = {"name_or_path": config.model.name_or_path, "revision": config.model.revision}
    return replace(current, fingerprint=current.fingerprint | {BASE_WEIGHTS: base})


def compare(saved: Identity, current: Identity, allow: list[str], path: Path) -> list[str]:
    """Sentences on what differs and may. Raises TrainingError that names everything that differs and may not."""
    different = _different(saved, current)
    refused = {key: words for key, words in different.items() if key not in allow}
    if refused:
        raise TrainingError(
            f"the checkpoint is of another run. {'; '.join(refused.values())}.",
            at=str(path),
            do=f"set it back, say that it may differ with resume.allow=[{','.join(refused)}], or start anew with "
            "resume=never and another output_dir.",
        )
    return [f"since the checkpoint, {words}" for words in (different | _steps_different(saved, current)).values()]


def compare_finished(saved: Identity, current: Identity, allow: list[str], run_dir: Path) -> list[str]:
    """As compare(), of a run that has ended, where other steps would be another run too."""
    different, steps = _different(saved, current), _steps_different(saved, current)
    refused = {key: words for key, words in different.items() if key not in allow}
    if refused or steps:
        allowed = f"say that it may differ with resume.allow=[{','.join(refused)}], " if refused else ""
        on = f"train on from it with {typed('resume.source', run_dir)} and " if steps else "start anew with "
        raise TrainingError(
            f"the run there is finished, and is another one. {'; '.join((refused | steps).values())}.",
            at=str(run_dir),
            do=f"set it back, {allowed}or {on}another output_dir.",
        )
    return [f"since that run, {words}" for words in different.values()]


def _different(saved: Identity, current: Identity) -> dict[str, str]:
    both = [(key, saved.fingerprint.get(key, default_of(key)), now) for key, now in current.fingerprint.items()]
    different = {key: f"{key}: was {was}, is {now}" for key, was, now in both if was != now}
    parts = [(name, was, current.data[name]) for name, was in saved.data.items() if name in current.data]
    if "data" in different and (named := [f"{name} was {was}, is {now}" for name, was, now in parts if was != now]):
        different["data"] = f"data: {', and '.join(named)}"
    return different


def _steps_different(saved: Identity, current: Identity) -> dict[str, str]:
    both = [(key, was, current.noted.get(key)) for key, was in saved.noted.items()]
    return {key: f"{key}: was {was}, is {now}" for key, was, now in both if was != now}


def default_of(key: str) -> Any:
    """The schema's default of a setting: what a checkpoint was made with that is older than the setting.

    None for a key that is no setting, or must be given.
    """
    group, _, name = key.partition(".")
    schema = get_type_hints(Config).get(group)
    for entry in fields(schema) if is_dataclass(schema) else ():
        if entry.name == name and entry.default is not MISSING:
            return plain({name: entry.default})[name]
        if entry.name == name and entry.default_factory is not MISSING:
            return plain({name: entry.default_factory()})[name]
    return None


def check_allowed(allow: list[str], current: Identity) -> None:
    """Raises ConfigError for a name in resume.allow that allows nothing."""
    known = [*current.fingerprint, BASE_WEIGHTS, OWNER]
    for name in allow:
        if name not in known:
            raise ConfigError(
                f"resume.allow names {name!r}, which is not compared.{did_you_mean(nearest(name, known))}",
                key="resume.allow",
                do="give the names that the error on resuming gives, or owner.",
            )


def with_base_weights(current: Identity, model: nn.Module, world: World, device: torch.device) -> Identity:
    """Every rank calls it, with the engine's own model."""
    return replace(current, fingerprint=current.fingerprint | {BASE_WEIGHTS: base_weights(model, world, device)})


def base_weights(model: nn.Module, world: World, device: torch.device) -> str:
    """A digest of the frozen weights: their names, shapes, dtypes and bits. Every rank calls it and gets the same.

    It is the same for every ZeRO stage and number of ranks: each rank adds up, modulo 2^64, its share of the elements
    times a pseudo-random odd number for each position, and the sums of the ranks are added. Made to tell one model
    from another, not to withstand somebody who looks for two with the same digest.
    """
    frozen = sorted((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    factors = _factors(device)
    sums = torch.zeros(len(frozen), dtype=torch.int64, device=device)
    for index, (_, parameter) in enumerate(frozen):
        start, part = own_part(parameter, world)
        sums[index] = _weighted_sum(part.to(device), start, factors)
    sum_over_ranks(sums)
    described = [
        [name, list(full_shape(parameter)), str(parameter.dtype), total]
        for (name, parameter), total in zip(frozen, sums.tolist(), strict=True)
    ]
    return _sha256(described)


def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0x7E57)  # torch's CPU generator: the same numbers on every machine
    return (torch.randint(-(2**62), 2**62, (BLOCK,), generator=generator) * 2 + 1).to(device)


def _weighted_sum(part: torch.Tensor, start: int, factors: torch.Tensor) -> torch.Tensor:
    """Sum of element x factor of its position, modulo 2^64; part is flat and begins at position start of the whole."""
    bits = part.detach().contiguous().view(INTEGERS[part.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    position = start
    while position < start + len(bits):
        block, offset = divmod(position, BLOCK)
        length = min(BLOCK - offset, start + len(bits) - position)
        chunk = bits[position - start : position - start + length].to(torch.int64)
        total += (chunk * factors[offset : offset + length]).sum() * factors[block % BLOCK]
        position += length
    return total


def _sha256(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
