"""Steps that left the weights as they are: which losses were not finite, and the records that were in them.

<run>/skipped_steps.jsonl has a row for each such step, with every record; the warning names the first few.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch

from tunesmith.train.files.rows import finite, keep_rows
from tunesmith.train.ranks.distributed import gather_floats, gather_texts
from tunesmith.train.ranks.state import Step
from tunesmith.train.run.feed import Feed

SKIPPED_FILE = "skipped_steps.jsonl"
MAX_NAMED = 3  # records in a warning, and ranks


def losses_not_finite(micro_losses: list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """(rank, micro batch) of every loss that is not finite. A collective: for a step that all ranks have left out."""
    here = ~torch.isfinite(torch.stack([loss.detach().float() for loss in micro_losses]))
    found = gather_floats(here[None].double())
    return tuple((int(rank), int(micro_batch)) for rank, micro_batch in found.nonzero().tolist())


@dataclass
class BadSteps:
    """Writes down the steps that were left out. Every rank makes one and calls it; rank 0 writes."""

    run_dir: Path
    feed: Feed
    device: torch.device
    writes: bool
    warn: Callable[[str], None]
    _cannot_write: bool = field(default=False, repr=False)

    @property
    def path(self) -> Path:
        return self.run_dir / SKIPPED_FILE

    def begin(self, step: int) -> None:
        """Drops the rows after the step that a run goes on from: they are written anew, or did not happen."""
        if self.writes:
            try:
                keep_rows(self.path, step)
            except OSError as error:
                self._give_up(error)

    def not_applied(self, number: int, step: Step, in_row: int) -> None:
        """Step `number`, counted from 1, had a loss or gradient that is not finite."""
        records = self._records(number)
        losses = [
            {"rank": rank, "micro_batch": index, "records": records[rank][index] if records[rank] else []}
            for rank, index in step.not_finite
        ]
        row: dict[str, Any] = {"reason": "not finite", "loss": finite(step.loss), "grad_norm": finite(step.grad_norm)}
        if losses:
            row["losses"] = losses
        else:
            row |= {"gradients_only": True, "records": _all(records)}
        self._write({"step": number, **row})
        self.warn(
            f"step {number}: loss {step.loss}, gradient norm {step.grad_norm}: not finite, so the weights were left as "
            f"they are ({in_row} in a row); {_words(losses) or 'every loss was finite, only the gradients were not'} "
            f"({SKIPPED_FILE})"
        )

    def passed_over(self, number: int) -> None:
        """Step `number` is not trained on: a loss spiked in it, or just after it, before the run was rolled back."""
        records = _all(self._records(number))
        self._write({"step": number, "reason": "passed over after a loss spike", "records": records})

    def _records(self, number: int) -> list[list[list[str]]]:
        """Where the records of a step came from, file.jsonl:12: of each rank, and of each of its micro batches."""
        try:
            mine = self.feed.names(number - 1)
        except OSError:  # the other ranks wait for an answer
            mine = []
        return [json.loads(text) for text in gather_texts(json.dumps(mine), self.device)]

    def _write(self, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(orjson.dumps(row) + b"\n")  # one write: no torn rows
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._cannot_write:
            self._cannot_write = True
            self.warn(f"{self.path} cannot be written ({error}); training goes on.")


def _all(records: list[list[list[str]]]) -> list[str]:
    return [place for rank in records for micro_batch in rank for place in micro_batch]


def _words(losses: list[dict[str, Any]]) -> str:
    """rank 1 micro batch 0: a.jsonl:3, a.jsonl:9 and 4 more"""
    parts = []
    for found in losses[:MAX_NAMED]:
        records = found["records"]
        more = f" and {len(records) - MAX_NAMED} more" if len(records) > MAX_NAMED else ""
        names = ", ".join(records[:MAX_NAMED]) or "no records"
        parts.append(f"rank {found['rank']} micro batch {found['micro_batch']}: {names}{more}")
    more = f"; and {len(losses) - MAX_NAMED} more losses" if len(losses) > MAX_NAMED else ""
    return "; ".join(parts) + more
