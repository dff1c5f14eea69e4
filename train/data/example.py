"""What an objective makes of a record, and what is packed and stored: tokens, and named columns beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tunesmith.train.data.records import Record

RESERVED = {"weights", "example"}  # columns that a batch has by itself


@dataclass(frozen=True)
class Example:
    """Tokens that are trained on together; packing never parts them.

    Tokens of different parts do not see each other, as two answers to one question that are compared. A part's first
    token is never a target: nothing before it predicts it.
    """

    place: str  # of its record, file.jsonl:12
    input_ids: np.ndarray  # [T] int32
    weights: np.ndarray  # [T] float32: of each token in the loss; 0: no target
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # what else is known of each token: name -> [T]
    part_starts: tuple[int, ...] = (0,)  # where the parts begin
    is_straddled: bool = False  # tokenised as a whole, other ids would have come before an answer than a server sends

    def __post_init__(self) -> None:
        lengths = {len(self.input_ids), len(self.weights), *map(len, self.columns.values())}
        if len(lengths) > 1 or self.columns.keys() & RESERVED:
            raise ValueError(f"{self.place}: columns {[*self.columns]} of {sorted(lengths)} tokens are no example.")


class MakesExamples(Protocol):
    """The part of an objective that preparing the data needs."""

    def examples(self, records: Sequence[Record]) -> list[list[Example]]:
        """The examples of each record; of many records at once, which tokenisers like. Raises DataError."""

    def cache_key(self) -> dict[str, Any]:
        """What the examples depend on besides records, tokenizer, kind and objective.targets, for JSON."""
