"""When the state of a run is saved, and what is kept."""

from dataclasses import dataclass

from tunesmith.train.config.schema.checks import check_positive
from tunesmith.train.errors import ConfigError


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the whole state of the run is saved, and what is kept."""

    every_steps: int | None = None  # optimizer steps between two saves; null: none by steps
    every_minutes: float | None = None  # minutes between two saves by rank 0's clock, beside every_steps; null: none
    at_end: bool = True  # a checkpoint after the last step, from which the run can be extended
    keep_last: int = 2  # newest checkpoints kept, at least 2; the best one by evaluate.metric is kept too
    keep_every_steps: int | None = None  # checkpoints of steps divisible by this are never deleted; null: none
    async_save: bool = False  # write in the background while training continues, from a copy in host memory
    max_failed_saves: int = 3  # failed saves in a row, as on a full disk, before the run ends

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
