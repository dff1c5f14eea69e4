"""Which steps are recorded, to see where their time goes."""

from dataclasses import dataclass

from tunesmith.train.config.schema.checks import check_positive
from tunesmith.train.errors import ConfigError


@dataclass(kw_only=True)
class ProfileConfig:
    """Recorded steps: a page and a trace of some, in <run>/profile/, and the figures of one in so many."""

    start_step: int | None = None  # first step of the page, after a warm-up; null: no page
    num_steps: int = 3  # steps of the page
    every_steps: int | None = None  # a step in so many is recorded for the metrics profile/...; null: none
    stacks: bool = False  # the page names the line of code of each wait for the device; slows the recorded steps
    nvtx: bool = False  # those steps are for nsys: NVTX ranges and the capture range instead of a page

    def __post_init__(self) -> None:
        check_positive("profile", start_step=self.start_step, num_steps=self.num_steps, every_steps=self.every_steps)
        if self.nvtx and (self.start_step is None or self.every_steps is not None or self.stacks):
            raise ConfigError(
                "profile.nvtx hands the steps from profile.start_step on to nsys, which cannot share the GPU's "
                "counters with profile.every_steps and profile.stacks.",
                key="profile.nvtx",
                do="choose profile=nsys, with neither of those two.",
            )
        if self.stacks and self.start_step is None:
            raise ConfigError(
                "profile.stacks is for the page, and no page is made.", key="profile.stacks", do="choose profile=on."
            )
