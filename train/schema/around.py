"""What goes on around the learning: checkpoints, evaluation, tracking, profiling, and the machines."""

from dataclasses import dataclass, field
from enum import StrEnum

from tunesmith.train.errors import ConfigError
from tunesmith.train.schema.checks import check_no_empty_text, check_not_negative, check_positive

MAX_TIMEOUT_MINUTES = 60.0 * 24 * 365  # a year: beyond any wait, within what a timedelta holds


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Device(StrEnum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the whole state of the run is saved, and what is kept."""

    every_steps: int | None = None  # optimizer steps between two saves; null: only at the end
    at_end: bool = True  # a checkpoint after the last step, from which the run can be extended
    keep_last: int = 2  # newest checkpoints kept; the one with the best eval loss is kept besides

    def __post_init__(self) -> None:
        check_positive("checkpoint", every_steps=self.every_steps, keep_last=self.keep_last)


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured on the validation records."""

    every_steps: int | None = None  # optimizer steps between two evaluations; null: only at the end
    batch_size: int = 8  # sequences per forward, one rank; does not change the figures
    generate: bool = True  # greedy answers at the end: exact match and ROUGE-L
    max_new_tokens: int = 256  # tokens in one generated answer at most
    max_records: int | None = None  # validation records answered; null: all
    num_samples: int = 8  # answers shown in the report and in W&B
    patience: int | None = None  # evaluations without a better loss before the run stops early; null: never

    def __post_init__(self) -> None:
        check_positive(
            "evaluate",
            every_steps=self.every_steps,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            max_records=self.max_records,
            patience=self.patience,
        )
        check_not_negative("evaluate", num_samples=self.num_samples)


@dataclass(kw_only=True)
class TrackConfig:
    """Where the numbers go besides the run folder."""

    wandb: WandbMode = WandbMode.auto  # auto: online with an API key, offline without one
    project: str = "tunesmith"  # W&B project
    group: str | None = None  # W&B group, for runs that belong together
    tags: list[str] = field(default_factory=list)  # W&B tags
    every_steps: int = 1  # steps between two rows in metrics.jsonl and W&B

    def __post_init__(self) -> None:
        check_positive("track", every_steps=self.every_steps)
        check_no_empty_text(self, "track.")


@dataclass(kw_only=True)
class ProfileConfig:
    """A torch.profiler trace of some steps of rank 0, written to <run>/profile/."""

    start_step: int | None = None  # first step recorded; null: no profile
    num_steps: int = 3  # steps recorded

    def __post_init__(self) -> None:
        check_positive("profile", start_step=self.start_step, num_steps=self.num_steps)


@dataclass(kw_only=True)
class ClusterConfig:
    """The machines the run is on."""

    device: Device = Device.auto  # auto: GPUs where there are any; cuda; cpu
    timeout_minutes: float = 10.0  # a collective that takes longer ends the run

    def __post_init__(self) -> None:
        check_positive("cluster", timeout_minutes=self.timeout_minutes)
        if self.timeout_minutes > MAX_TIMEOUT_MINUTES:
            raise ConfigError(
                f"timeout_minutes={self.timeout_minutes:g} is more than a year.",
                key="cluster.timeout_minutes",
                do="give the minutes after which a rank that does not answer is lost, such as 10.",
            )
