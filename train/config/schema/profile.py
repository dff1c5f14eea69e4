"""A trace of some steps."""

from dataclasses import dataclass

from tunesmith.train.config.schema.checks import check_positive


@dataclass(kw_only=True)
class ProfileConfig:
    """A torch.profiler trace of some steps of rank 0, written to <run>/profile/."""

    start_step: int | None = None  # first step recorded; null: no profile
    num_steps: int = 3  # steps recorded

    def __post_init__(self) -> None:
        check_positive("profile", start_step=self.start_step, num_steps=self.num_steps)
