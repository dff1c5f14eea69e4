"""A second objective, which lives here to show the seam: of two answers the right one is to be likelier, by a margin.

loss = sum over pairs of max(0, margin - (score(right) - score(wrong)))  /  pairs
score(answer) = log p(answer | question), less that of the model before training with settings.reference
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tunesmith.train.config.config import Config, Targets
from tunesmith.train.data.example import Example
from tunesmith.train.data.records import Record
from tunesmith.train.data.render import Renderer
from tunesmith.train.data.store import Batch
from tunesmith.train.model.scorer import Scorer
from tunesmith.train.objective.objective import Goal, Sums, objective, read_settings


@dataclass
class Settings:
    margin: float = 1.0  # nats
    reference: bool = False  # measure from the model before training; needs an adapter


@objective("hinge")
class Hinge:
    """The wrong answer is the right one with its words in reverse. Each pair is one example of two parts."""

    figures: Mapping[str, Goal] = {"hinge": "min", "accuracy": "max"}

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._settings = read_settings(Settings, config)
        self._renderer = Renderer(tokenizer)

    def examples(self, records: Sequence[Record]) -> list[list[Example]]:
        right = self._renderer.render([_answered(record, 1) for record in records], Targets.last_turn)
        wrong = self._renderer.render([_answered(record, -1) for record in records], Targets.last_turn)
        return [[_pair(a[-1], b[-1])] for a, b in zip(right, wrong, strict=True)]

    def cache_key(self) -> dict[str, Any]:
        return {}

    def denominator(self, batch: Batch) -> float:
        return batch.num_examples

    def sums(self, model: Scorer, batch: Batch) -> Sums:
        before: torch.Tensor | float = 0.0
        if self._settings.reference:
            with model.reference():
                before = _scores(batch, model.logprobs(batch))
        scores = _scores(batch, model.logprobs(batch)) - before
        losses = (self._settings.margin - scores).clamp(min=0)
        told = losses.detach(), scores.detach()
        totals = {"hinge": told[0].double().sum(), "better": (told[1] > 0).sum(), "pairs": batch.num_examples}
        return Sums(losses.sum() / model.divisor, totals)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        pairs = totals["pairs"]
        return {"hinge": totals["hinge"] / pairs, "accuracy": totals["better"] / pairs}


def _scores(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    """Of each pair what the right answer's log-probability is above the wrong one's, [batch.num_examples]."""
    zeros = torch.zeros(batch.num_examples, device=logprobs.device)
    return zeros.index_add(0, batch.of_targets("example"), batch.of_targets("side") * logprobs)


def _answered(record: Record, order: int) -> Record:
    *before, last = record.messages
    words = [*(last.content or "").split(), "so"]  # two words at least
    return replace(record, messages=[*before, replace(last, content=" ".join(words[::order]), weight=1.0)])


def _pair(right: Any, wrong: Any) -> Example:
    weights = np.concatenate([right.weights > 0, wrong.weights > 0]).astype(np.float32)
    sides = np.repeat(np.array([1, -1], dtype=np.float32), [len(right.input_ids), len(wrong.input_ids)])
    ids = np.concatenate([right.input_ids, wrong.input_ids])
    return Example(right.place, ids, weights, {"side": sides}, (0, len(right.input_ids)))
