"""The records of one split -> its examples, truncated as asked, its questions and its counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.train.config.config import Config, Truncate
from tunesmith.train.data.example import Example, MakesExamples
from tunesmith.train.data.questions import write_question
from tunesmith.train.data.records import MAX_SHOWN, Record
from tunesmith.train.data.render import target_turns
from tunesmith.train.data.report import SplitReport
from tunesmith.train.data.store import TokenStore, write_store
from tunesmith.train.errors import DataError


class SplitBuilder:
    """Collects the examples of one split, and writes its store, questions and report."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, objective: MakesExamples) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.objective = objective
        self.sequence_length = config.batch.sequence_length
        self.examples: list[Example] = []
        self.questions: list[bytes] = []
        self.too_long: list[tuple[str, int]] = []
        self.num_rows = self.num_expanded = self.num_dropped = self.num_truncated = self.num_straddling = 0

    def add(self, records: list[Record]) -> None:
        """Render, tokenise and truncate some records."""
        targets = self.config.objective.targets
        for record, examples in zip(records, self.objective.examples(records), strict=True):
            self.num_rows += 1
            self.num_expanded += len(examples) > 1
            kept = [self._add(example) for example in examples]
            if kept and kept[-1]:
                self._add_question(record, target_turns(record, targets)[-1], examples[-1])

    def _add(self, example: Example) -> bool:
        """Keep one example unless it is too long. Returns whether it was kept."""
        if len(example.input_ids) > self.sequence_length:
            if self.config.data.truncate is Truncate.error:
                self.too_long.append((example.place, len(example.input_ids)))
                return False
            if self.config.data.truncate is Truncate.drop:
                self.num_dropped += 1
                return False
            example = self._truncated(example)
            self.num_truncated += 1
        targets = example.weights != 0
        targets[list(example.part_starts)] = False  # nothing before a part's first token predicts it
        if not targets.any():
            raise DataError(f"{example.place}: no target token is left.", do="write a longer prompt or answer.")
        self.num_straddling += example.is_straddled
        self.examples.append(example)
        return True

    def _truncated(self, example: Example) -> Example:
        """Without enough tokens from the left of the prompt to fit; a bos token stays, and so does one prompt token."""
        ids = example.input_ids
        if len(example.part_starts) > 1:
            raise DataError(
                f"{example.place}: {len(ids)} tokens of {len(example.part_starts)} answers that are compared don't fit "
                f"into sequence_length={self.sequence_length}, and are not cut.",
                at="batch.sequence_length",
                do="raise batch.sequence_length, or set data.truncate=drop.",
            )
        first_target = int(np.flatnonzero(example.weights)[0])
        num_bos = int(ids[0] == self.tokenizer.bos_token_id)
        surplus = len(ids) - self.sequence_length
        if surplus > first_target - max(num_bos, 1):
            raise DataError(
                f"{example.place}: the {len(ids) - first_target} tokens from its first answer on don't fit into "
                f"sequence_length={self.sequence_length}, even without the prompt.",
                at="batch.sequence_length",
                do="raise batch.sequence_length, shorten the record, or set data.truncate=drop.",
            )
        keep = np.r_[0:num_bos, num_bos + surplus : len(ids)]
        columns = {name: column[keep] for name, column in example.columns.items()}
        return replace(example, input_ids=ids[keep], weights=example.weights[keep], columns=columns)

    def _add_question(self, record: Record, index: int, example: Example) -> None:
        surplus = max(0, len(example.input_ids) - self.sequence_length)
        num_prompt_tokens = None
        if surplus:
            learned = example.weights != 0
            last_start = int(np.flatnonzero(learned & ~np.r_[False, learned[:-1]])[-1])
            num_prompt_tokens = last_start - surplus
        if line := write_question(record, index, num_prompt_tokens):
            self.questions.append(line)

    def write(self, folder: Path) -> SplitReport:
        """Pack and write what was added. Raises DataError when records were too long or none is left."""
        if self.too_long:
            raise self._too_long_error()
        if not self.examples:
            raise DataError(
                f"all {self.num_dropped} records were dropped: longer than sequence_length={self.sequence_length}.",
                at="batch.sequence_length",
                do="raise batch.sequence_length.",
            )
        packing = self.config.batch.packing
        write_store(folder, self.examples, sequence_length=self.sequence_length, packing=packing)
        (folder / "questions.jsonl").write_bytes(b"".join(self.questions))
        store = TokenStore(folder, sequence_length=self.sequence_length, packing=packing)
        return SplitReport(
            num_rows=self.num_rows,
            num_records=store.num_records,
            num_expanded=self.num_expanded,
            num_dropped=self.num_dropped,
            num_truncated=self.num_truncated,
            num_straddling=self.num_straddling,
            num_tokens=store.num_tokens,
            num_target_tokens=store.num_target_tokens,
            num_sequences=store.num_sequences,
            sequence_length=self.sequence_length,
            longest=store.max_length,
            fill=store.fill,
        )

    def _too_long_error(self) -> DataError:
        longest = max(length for _, length in self.too_long)
        do = f"set batch.sequence_length={longest}, or data.truncate=drop or left_of_prompt."
        if len(self.too_long) == 1:
            return DataError(
                f"{self.too_long[0][0]}: {longest} tokens are more than sequence_length={self.sequence_length}.",
                at="batch.sequence_length",
                do=do,
            )
        shown = [f"{place}: {length} tokens" for place, length in self.too_long[:MAX_SHOWN]]
        rest = f"\n  and {len(self.too_long) - MAX_SHOWN} more" if len(self.too_long) > MAX_SHOWN else ""
        return DataError(
            f"{len(self.too_long)} records are longer than sequence_length={self.sequence_length}:\n  "
            + "\n  ".join(shown)
            + rest,
            at="batch.sequence_length",
            do=do,
        )
