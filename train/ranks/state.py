"""What a run has done: in one step, and so far."""

from dataclasses import dataclass, field

from tunesmith.train.ranks.step_vote import StepConsensus


@dataclass(frozen=True)
class Step:
    """One optimizer step over the global batch. The loss is the objective's: for sft per target token, in nats."""

    loss: float
    grad_norm: float
    applied: bool
    tokens: int
    target_tokens: int
    consensus: StepConsensus  # what the ranks told each other in it
    not_finite: tuple[tuple[int, int], ...] = ()  # (rank, micro batch) of the losses that were not finite, if any
    metrics: dict[str, float] = field(default_factory=dict)  # what else the objective says of the step, by name


@dataclass
class RunState:
    """Counters of the loop, all that it needs besides the engine to go on. Data position is the step itself."""

    step: int = 0  # optimizer steps done
    tokens_seen: int = 0
    target_tokens_seen: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    best_step: int | None = None
    best_metric: float | None = None  # the figure of best_name there
    best_name: str = "eval/loss"  # what evaluate.metric was
    evaluations_without_better: int = 0
    evaluated_step: int | None = None  # of the last evaluation, and what it gave
    evaluation: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None  # of the last step
    train_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # the last ones, newest last: what a loss spike is told by
    rollbacks: int = 0  # times the run went back to a checkpoint because of a loss spike
    passed_over: list[int] = field(default_factory=list)  # steps, counted from 1, that are not trained on since then

    def count(self, step: Step, seconds: float) -> None:
        """A step is done."""
        self.step += 1
        self.tokens_seen += step.tokens
        self.target_tokens_seen += step.target_tokens
        self.train_seconds += seconds
        self.skipped_in_row = 0 if step.applied else self.skipped_in_row + 1
        self.skipped_steps += not step.applied
        self.train_loss = step.loss
