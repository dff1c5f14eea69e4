"""How examples become batches."""

from dataclasses import dataclass
from enum import StrEnum

from tunesmith.train.config.schema.checks import check_positive
from tunesmith.train.errors import ConfigError


class Packing(StrEnum):
    auto = "auto"
    best_fit = "best_fit"
    none = "none"


@dataclass(kw_only=True)
class BatchConfig:
    """How examples become batches."""

    global_batch_size: int  # sequences per optimizer step, all ranks
    micro_batch_size: int  # sequences per forward, one rank; with memory=auto at most so many; accumulation follows
    sequence_length: int  # tokens in one sequence at most
    packing: Packing = (
        Packing.auto
    )  # best_fit: several records fill one sequence; none: one; auto: what the model takes

    def __post_init__(self) -> None:
        check_positive(
            "batch",
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
        )

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Forwards per optimizer step on each rank. Raises ConfigError when the global batch does not divide."""
        forward = self.micro_batch_size * world_size
        if self.global_batch_size % forward:
            below = self.global_batch_size // forward * forward
            sizes = f"{below} or {below + forward}" if below else f"{forward}"
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} does not divide into forwards of {forward} sequences "
                f"(micro_batch_size={self.micro_batch_size} x world_size={world_size}).",
                key="batch.global_batch_size",
                do=f"set batch.global_batch_size to {sizes}, or change batch.micro_batch_size.",
            )
        return self.global_batch_size // forward
