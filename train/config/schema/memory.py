"""What a GPU's memory is spent on: activations that are kept, or computed again."""

from dataclasses import dataclass

from tunesmith.train.config.schema.checks import check_positive
from tunesmith.train.errors import ConfigError


@dataclass(kw_only=True)
class MemoryConfig:
    """How many of the model's blocks keep what their backward needs; the others compute it again."""

    recompute: float | None = None  # share of the blocks, evenly spread: 0 none, 1 all; null: as few as memory allows
    limit_gib: float | None = None  # GiB of each GPU that a run may plan with; null: all there is

    def __post_init__(self) -> None:
        check_positive("memory", limit_gib=self.limit_gib)
        if self.recompute is not None and not 0 <= self.recompute <= 1:
            raise ConfigError(
                f"recompute={self.recompute} is no share of the blocks.",
                key="memory.recompute",
                do="give a number from 0 to 1, or null.",
            )
