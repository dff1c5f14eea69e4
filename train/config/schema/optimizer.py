"""How weights are updated, and what a run does when its loss goes wrong."""

from dataclasses import dataclass
from enum import StrEnum

from tunesmith.train.config.schema.checks import check_fraction, check_not_negative, check_positive


class OnSpike(StrEnum):
    warn = "warn"
    rollback = "rollback"
    stop = "stop"


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW; no decay on norms, biases and embeddings."""

    learning_rate: float  # at the top of the schedule
    weight_decay: float = 0.0  # a step takes off learning_rate x this of a weight; none for norms, biases, embeddings
    beta1: float = 0.9  # how much of the mean gradient is kept each step
    beta2: float = 0.95  # how much of the mean squared gradient is kept each step
    eps: float = 1e-8  # added to the root of the mean squared gradient
    max_grad_norm: float | None = 1.0  # global L2 norm the gradient is clipped to; null: no clipping
    max_skipped_steps: int = 10  # steps in a row with a non-finite loss or gradient before the run ends
    on_spike: OnSpike = OnSpike.warn  # when the loss spikes: warn; rollback to the checkpoint before it; or stop
    spike_sigma: float = 6.0  # standard deviations above the mean of the last 128 losses that make a spike
    max_rollbacks: int = 3  # roll-backs before a further spike ends the run

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
