"""The seam of everything that is learned: an objective makes examples of records, and of a batch its part of the loss.

A new one is a file of this folder and a yaml of conf/objective/ (docs/extending.md):

    @objective("dpo")
    class Preference: ...

The loss of a step is one sum over all batches of all ranks, divided by one denominator that is known from the batches
before the first forward. So it does not depend on how a global batch is split into ranks and micro batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from tunesmith.train.config.config import Config
from tunesmith.train.config.suggest import did_you_mean, nearest
from tunesmith.train.data.example import MakesExamples
from tunesmith.train.data.store import Batch
from tunesmith.train.errors import ConfigError
from tunesmith.train.model.scorer import Scorer

FOLDER = Path(__file__).parent
T = TypeVar("T")
Goal = Literal["min", "max"]


@dataclass(frozen=True)
class Sums:
    """What one batch adds to a step or an evaluation.

    totals are sums that metrics() makes figures of, [] tensors without a gradient or numbers: the same names for every
    batch of a step. In training they are logged as train/<figure>; where there are none, nothing is.
    """

    loss: Tensor  # [], differentiable: a sum over model.divisor
    totals: Mapping[str, Tensor | float] = field(default_factory=dict)


class Objective(MakesExamples, Protocol):
    """What is learned. Made once a run, before the data is prepared, as kind(config, tokenizer).

    examples() and cache_key() are train/data/example.py's.
    """

    figures: Mapping[str, Goal]  # of an evaluation, by name, and which way is better; evaluate.metric is eval/<name>

    def denominator(self, batch: Batch) -> float:
        """A batch's part of what the step's loss is divided by: target weight, pairs, ..."""

    def sums(self, model: Scorer, batch: Batch) -> Sums:
        """A batch's part of the loss; the same call without gradients is its part of an evaluation."""

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Figures from totals that are summed over batches and ranks: never means of means."""


def add_to(added: dict[str, Tensor], totals: Mapping[str, Tensor | float], device: torch.device) -> None:
    """Adds the totals of a batch to those of the batches before it, float64, on the device. Waits for nothing."""
    for name, value in totals.items():
        added.setdefault(name, torch.zeros((), dtype=torch.float64, device=device)).add_(value)


_KINDS: dict[str, Any] = {}  # kind -> class


def objective(kind: str) -> Callable[[type[T]], type[T]]:
    """Registers a class as objective.kind=<kind>; a file of this folder is named after its kind, and found by it."""

    def register(found: type[T]) -> type[T]:
        _KINDS[kind] = found
        return found

    return register


def make_objective(config: Config, tokenizer: Any) -> Objective:
    """The config's objective. Raises ConfigError for one that does not exist, or that lacks evaluate.metric."""
    kind = config.objective.kind
    known = sorted(_KINDS.keys() | {path.stem for path in FOLDER.glob("[a-z]*.py")} - {Path(__file__).stem})
    if kind not in known:
        raise ConfigError(
            f"there is no objective {kind!r}.{did_you_mean(nearest(kind, known))}",
            key="objective.kind",
            do=f"choose one of {', '.join(known)}.",
        )
    if kind not in _KINDS:
        import_module(f"{__package__}.{kind}")
    figures = [f"eval/{name}" for name in _KINDS[kind].figures]
    if config.evaluate.metric not in figures:
        raise ConfigError(
            f"objective.kind={kind} has no figure {config.evaluate.metric!r}."
            f"{did_you_mean(nearest(config.evaluate.metric, figures))}",
            key="evaluate.metric",
            do=f"choose one of {', '.join(figures)}.",
        )
    made: Objective = _KINDS[kind](config, tokenizer)
    return made


def read_settings(settings: type[T], config: Config) -> T:
    """objective.settings as a dataclass of the objective's own. Raises ConfigError for what does not fit it."""
    given = config.objective.settings
    known = [entry.name for entry in fields(settings)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"objective.kind={config.objective.kind} has no setting {name!r}.{did_you_mean(nearest(name, known))}",
                key=f"objective.settings.{name}",
                do=f"its settings are {', '.join(known)}." if known else "leave it out: it has no settings.",
            )
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), given))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        key = f"objective.settings.{error.full_key}" if error.full_key else "objective.settings"
        raise ConfigError(f"{reason}.", key=key, do="give it a value of its type.") from None
    assert isinstance(made, settings)
    return made
