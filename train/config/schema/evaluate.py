"""What is measured on the validation records, and which figure says that a run is better."""

from dataclasses import dataclass

from tunesmith.train.config.schema.checks import check_no_empty_text, check_not_negative, check_positive


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
