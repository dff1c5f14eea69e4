"""What goes on around the learning: checkpoints, evaluation, tracking, profiling. The machines: cluster.py."""

from dataclasses import dataclass, field
from enum import StrEnum

from tunesmith.train.config.schema.checks import check_no_empty_text, check_not_negative, check_positive, check_strings
from tunesmith.train.errors import ConfigError


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class MetricGoal(StrEnum):
    min = "min"
    max = "max"


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the whole state of the run is saved, and what is kept."""

    every_steps: int | None = None  # optimizer steps between two saves; null: none by steps
    every_minutes: float | None = None  # minutes between two saves, by rank 0's clock, besides every_steps; null: none
    at_end: bool = True  # a checkpoint after the last step, from which the run can be extended
    keep_last: int = 2  # newest checkpoints kept, at least 2; the best one by evaluate.metric is kept too
    keep_every_steps: int | None = None  # checkpoints of steps that this divides are kept for good; null: none
    async_save: bool = False  # write in the background while training goes on, from a copy in host memory
    max_failed_saves: int = 3  # saves in a row that could not be written, as on a full disk, before the run ends

    def __post_init__(self) -> None:
        check_positive(
            "checkpoint",
            every_steps=self.every_steps,
            every_minutes=self.every_minutes,
            keep_every_steps=self.keep_every_steps,
            max_failed_saves=self.max_failed_saves,
        )
        if self.keep_last < 2:
            raise ConfigError(
                f"keep_last={self.keep_last} leaves nothing to go back to when the newest checkpoint is damaged.",
                key="checkpoint.keep_last",
                do="keep at least 2.",
            )


@dataclass(kw_only=True)
class ResumeConfig:
    """What the run goes on from."""

    source: str  # auto: output_dir's newest whole checkpoint, if it has any; never; or a run folder or a checkpoint
    allow: list[str] = field(default_factory=list)  # what may differ from the checkpoint: names from the error, owner

    def __post_init__(self) -> None:
        check_no_empty_text(self, "resume.")


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured on the validation records."""

    every_steps: int | None = None  # optimizer steps between two evaluations; null: only at the end
    batch_size: int = 8  # sequences per forward, one rank; does not change the figures
    generate: bool = True  # greedy answers at the end: exact match and ROUGE-L
    max_new_tokens: int = 256  # tokens in one generated answer at most
    max_records: int | None = None  # validation records answered; null: all
    num_samples: int = 8  # answers shown in the report and in W&B
    metric: str = "eval/loss"  # the figure that decides which weights are best; patience follows it too
    metric_goal: MetricGoal = MetricGoal.min  # whether that figure is better when it is lower (min) or higher (max)
    patience: int | None = None  # evaluations without a better evaluate.metric before the run stops early; null: never

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
        check_no_empty_text(self, "evaluate.")


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
        check_strings("track.tags", self.tags, what="tag")
        check_no_empty_text(self, "track.")


@dataclass(kw_only=True)
class ProfileConfig:
    """A torch.profiler trace of some steps of rank 0, written to <run>/profile/."""

    start_step: int | None = None  # first step recorded; null: no profile
    num_steps: int = 3  # steps recorded

    def __post_init__(self) -> None:
        check_positive("profile", start_step=self.start_step, num_steps=self.num_steps)
