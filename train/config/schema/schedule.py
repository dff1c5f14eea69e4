"""How long a run is, and its learning rate over the steps."""

from dataclasses import dataclass
from enum import StrEnum

from tunesmith.train.config.schema.checks import check_fraction, check_positive
from tunesmith.train.errors import ConfigError


class ScheduleKind(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(kw_only=True)
class ScheduleConfig:
    """How long the run is, and the learning rate over it."""

    kind: ScheduleKind  # how the learning rate falls after the warm-up
    epochs: float | None = None  # passes over the training data; this or max_steps
    max_steps: int | None = None  # optimizer steps; this or epochs
    warmup_fraction: float = 0.0  # share of the steps over which the learning rate rises from 0
    decay_fraction: float = 0.2  # wsd: share of the steps, at the end, over which it falls
    final_fraction: float = 0.0  # learning rate at the end, as a share of the top; linear, cosine and wsd

    def __post_init__(self) -> None:
        check_positive("schedule", epochs=self.epochs, max_steps=self.max_steps)
        check_fraction("schedule", warmup_fraction=self.warmup_fraction, final_fraction=self.final_fraction)
        if (self.epochs is None) == (self.max_steps is None):
            raise ConfigError(
                f"schedule.epochs={self.epochs} and schedule.max_steps={self.max_steps}: exactly one must be set.",
                key="schedule.max_steps",
                do="set one and put null for the other, such as schedule.epochs=null schedule.max_steps=500.",
            )
        if self.kind is ScheduleKind.constant and self.final_fraction:
            raise ConfigError(
                f"schedule.final_fraction={self.final_fraction} means nothing with schedule.kind=constant.",
                key="schedule.final_fraction",
                do="leave it out, or choose schedule=linear, cosine or wsd.",
            )
        if self.kind is ScheduleKind.wsd and not 0 < self.decay_fraction <= 1 - self.warmup_fraction:
            raise ConfigError(
                f"decay_fraction={self.decay_fraction} must be above 0 and leave room for "
                f"warmup_fraction={self.warmup_fraction}.",
                key="schedule.decay_fraction",
                do=f"give it at most {1 - self.warmup_fraction:g}.",
            )
