"""Supervised fine-tuning: the next token of what the assistant says.

loss = sum over targets of weight x -log p(target | what is before it)  /  sum of the weights of all targets
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tunesmith.train.config.config import Config
from tunesmith.train.data.example import Example
from tunesmith.train.data.records import Record
from tunesmith.train.data.render import Renderer
from tunesmith.train.data.store import Batch
from tunesmith.train.model.scorer import Scorer
from tunesmith.train.objective.objective import Goal, Sums, objective, read_settings


@dataclass
class Settings:
    """None: which turns are learned is objective.targets, which prepare() follows for the questions too."""


@objective("sft")
class Sft:
    """Token-weighted loss (nats); evaluated also as perplexity and token accuracy."""

    figures: Mapping[str, Goal] = {"loss": "min", "perplexity": "min", "token_accuracy": "max"}

    def __init__(self, config: Config, tokenizer: Any) -> None:
        read_settings(Settings, config)
        self._targets = config.objective.targets
        self._renderer = Renderer(tokenizer)

    def examples(self, records: Sequence[Record]) -> list[list[Example]]:
        """One of each record, or one for each learned turn where the template rewrites earlier turns."""
        return [
            [Example(one.place, one.input_ids, one.weights, is_straddled=one.is_straddled) for one in rendered]
            for rendered in self._renderer.render(records, self._targets)
        ]

    def cache_key(self) -> dict[str, Any]:
        return {}  # targets are in the key for every objective

    def denominator(self, batch: Batch) -> float:
        return batch.target_weight

    def sums(self, model: Scorer, batch: Batch) -> Sums:
        nll = model.nll(batch)
        if nll.num_correct is None:
            return Sums(nll.loss)
        totals: dict[str, Tensor | float] = {
            "loss": nll.loss,
            "weight": batch.of_targets("weights").double().sum(),
            "correct": nll.num_correct,
            "targets": batch.num_target_tokens,
        }
        return Sums(nll.loss, totals)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        loss = totals["loss"] / totals["weight"]
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": totals["correct"] / totals["targets"],
        }
