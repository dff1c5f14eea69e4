"""How it learns: batches, optimizer, learning rate, and what DeepSpeed shards."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tunesmith.train.config.schema.checks import check_fraction, check_no_empty_text, check_not_negative, check_positive
from tunesmith.train.errors import ConfigError


class Packing(StrEnum):
    best_fit = "best_fit"
    none = "none"


class ScheduleKind(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Precision(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class OnSpike(StrEnum):
    warn = "warn"
    rollback = "rollback"
    stop = "stop"


class Offload(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(kw_only=True)
class BatchConfig:
    """How examples become batches."""

    global_batch_size: int  # sequences per optimizer step, all ranks
    micro_batch_size: int  # sequences per forward, one rank; accumulation follows from the two and the ranks
    sequence_length: int  # tokens in one sequence at most
    packing: Packing = Packing.best_fit  # best_fit: several records fill one sequence; none: one record a sequence

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


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW; no decay on norms, biases and embeddings."""

    learning_rate: float  # at the top of the schedule
    weight_decay: float = 0.0  # share of a weight taken off at learning rate 1; norms, biases and embeddings are spared
    beta1: float = 0.9  # how much of the mean gradient is kept each step
    beta2: float = 0.95  # how much of the mean squared gradient is kept each step
    eps: float = 1e-8  # added to the root of the mean squared gradient
    max_grad_norm: float | None = 1.0  # global L2 norm the gradient is clipped to; null: no clipping
    max_skipped_steps: int = 10  # steps in a row with a non-finite loss or gradient before the run ends
    on_spike: OnSpike = OnSpike.warn  # when the loss leaps: warn; rollback to the checkpoint before; or stop
    spike_sigma: float = 6.0  # standard deviations above the mean of the last 128 losses that make a leap
    max_rollbacks: int = 3  # times a run goes back before a further leap ends it

    def __post_init__(self) -> None:
        check_positive(
            "optimizer",
            learning_rate=self.learning_rate,
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
            max_skipped_steps=self.max_skipped_steps,
            spike_sigma=self.spike_sigma,
            max_rollbacks=self.max_rollbacks,
        )
        check_fraction("optimizer", beta1=self.beta1, beta2=self.beta2)
        check_not_negative("optimizer", weight_decay=self.weight_decay)


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


@dataclass(kw_only=True)
class EngineConfig:
    """DeepSpeed ZeRO: what is sharded over the ranks, what is offloaded, and the number format."""

    stage: int  # 0: nothing sharded; 1: optimizer state; 2: + gradients; 3: + weights
    precision: Precision = Precision.bf16  # of weights and activations; master weights and moments are always fp32
    offload_optimizer: Offload = Offload.none  # where the optimizer state lives
    offload_weights: Offload = Offload.none  # where the weights live; stage 3 only
    nvme_path: str | None = None  # folder on a local NVMe disk, for offload to nvme
    deepspeed: dict[str, Any] = field(default_factory=dict)  # raw DeepSpeed keys, added to ours

    def __post_init__(self) -> None:
        check_no_empty_text(self, "engine.")
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(
                f"ZeRO stages are 0 to 3, not {self.stage}.",
                key="engine.stage",
                do="choose engine=ddp, zero1, zero2 or zero3.",
            )
        self._check_offload()

    def _check_offload(self) -> None:
        if self.offload_optimizer is not Offload.none and self.stage == 0:
            raise ConfigError(
                "offload needs ZeRO 1 or higher.", key="engine.offload_optimizer", do="set engine.stage to 1, 2 or 3."
            )
        if self.offload_weights is not Offload.none and self.stage != 3:
            raise ConfigError(
                "offloaded weights need ZeRO 3.", key="engine.offload_weights", do="set engine=zero3_offload."
            )
        if self.offload_optimizer is Offload.nvme and self.stage != 3:
            raise ConfigError("NVMe offload needs ZeRO 3.", key="engine.offload_optimizer", do="set engine=zero3_nvme.")
        nvme = Offload.nvme in (self.offload_optimizer, self.offload_weights)
        if nvme != (self.nvme_path is not None):
            raise ConfigError(
                "NVMe offload needs engine.nvme_path."
                if nvme
                else "engine.nvme_path is set but nothing is offloaded to nvme.",
                key="engine.nvme_path",
                do="set engine=zero3_nvme engine.nvme_path=/local/nvme, or neither.",
            )
