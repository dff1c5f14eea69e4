"""Records -> packed token stores, once for each combination of what they depend on, before any process group exists."""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from tunesmith.train.config.config import Config, Packing, Truncate
from tunesmith.train.data.cache import cache_folder, open_or_build
from tunesmith.train.data.example import Example, MakesExamples
from tunesmith.train.data.questions import Question, prompts_in, read_questions, write_question
from tunesmith.train.data.records import MAX_SHOWN, Record, read_records
from tunesmith.train.data.render import target_turns
from tunesmith.train.data.report import DataReport, SplitReport
from tunesmith.train.data.sources import find_sources
from tunesmith.train.data.store import TokenStore, write_store
from tunesmith.train.errors import DataError
from tunesmith.train.ranks.distributed import world_from_environment

FORMAT_VERSION = 1  # raise it when the same input gives other arrays
CHUNK = 1000  # records rendered and tokenised together

__all__ = ["DataReport", "PreparedData", "Question", "SplitReport", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, memory-mapped."""

    train: TokenStore
    validation: TokenStore | None
    questions: list[Question]  # of the validation split
    report: DataReport
    fingerprint: str  # of everything the arrays depend on
    _read_train_questions: Callable[[], list[Question]] = field(repr=False)

    def train_questions(self) -> list[Question]:
        """The questions of the training split, read anew at each call."""
        return self._read_train_questions()


def prepare(
    config: Config, tokenizer: PreTrainedTokenizerBase, objective: MakesExamples, *, show_progress: bool
) -> PreparedData:
    """Read, render, tokenise and pack the data of a run, or open what an earlier run has left in the cache.

    objective makes the examples of the records. Raises: DataError for anything wrong with the data, with file and line.
    """
    assert config.batch.packing is not Packing.auto, "what it comes to is the model's to say"
    key = fingerprint(config, tokenizer, objective)
    show = show_progress and world_from_environment().local_rank == 0
    folder = open_or_build(
        cache_folder(config.data.cache_dir), key, lambda empty: _build(empty, config, tokenizer, objective, show)
    )
    has_validation = (folder / "validation").is_dir()
    return PreparedData(
        train=_open(folder / "train", config),
        validation=_open(folder / "validation", config) if has_validation else None,
        questions=read_questions(folder / "validation/questions.jsonl", tokenizer) if has_validation else [],
        report=DataReport.from_dict(orjson.loads((folder / "report.json").read_bytes())),
        fingerprint=key,
        _read_train_questions=lambda: read_questions(folder / "train/questions.jsonl", tokenizer),
    )


def fingerprint(config: Config, tokenizer: PreTrainedTokenizerBase, objective: MakesExamples) -> str:
    """A hash of everything the prepared arrays depend on."""
    backend = orjson.loads(tokenizer.backend_tokenizer.to_str())
    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "versions": [transformers.__version__, tokenizers.__version__],
        "tokenizer": {name: value for name, value in backend.items() if name not in ("truncation", "padding")},
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "train": [(source.name, source.digest()) for source in find_sources(config.data.train_sources)],
        "validation": [(source.name, source.digest()) for source in find_sources(config.data.validation_sources)],
        "validation_fraction": config.data.validation_fraction,
        "split_seed": config.seed if config.data.validation_fraction else None,
        "truncate": config.data.truncate,
        "targets": config.objective.targets,
        "sequence_length": config.batch.sequence_length,
        "packing": config.batch.packing,
    }
    if config.objective.kind != "sft":  # whose keys are as old as the cache
        source = Path(inspect.getfile(type(objective))).read_bytes()  # other code may make other examples
        parts["objective"] = [config.objective.kind, objective.cache_key(), hashlib.sha256(source).hexdigest()]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def split_records(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and validation records: each record's lot depends on the seed and its index only, so rows added at the
    end move no earlier one. Raises DataError when one side would be empty.
    """
    lots = np.random.Generator(np.random.Philox(key=seed)).random(len(records))
    train = [record for record, lot in zip(records, lots, strict=True) if lot >= fraction]
    validation = [record for record, lot in zip(records, lots, strict=True) if lot < fraction]
    if not train or not validation:
        raise DataError(
            f"validation_fraction={fraction} of {len(records)} records leaves {len(train)} for training and "
            f"{len(validation)} for validation.",
            at="data.validation_fraction",
            do="give more records, another fraction, or a data.validation file.",
        )
    return train, validation


def _open(folder: Path, config: Config) -> TokenStore:
    return TokenStore(folder, sequence_length=config.batch.sequence_length, packing=config.batch.packing)


def _build(
    folder: Path, config: Config, tokenizer: PreTrainedTokenizerBase, objective: MakesExamples, show_progress: bool
) -> None:
    splits = {"train": read_records(config.data.train_sources)}
    if config.data.validation_sources:
        splits["validation"] = read_records(config.data.validation_sources)
    elif config.data.validation_fraction:
        splits["train"], splits["validation"] = split_records(
            splits["train"], config.data.validation_fraction, config.seed
        )
    reports: dict[str, SplitReport] = {}
    with _progress(show_progress, sum(map(len, splits.values()))) as advance:
        for name, records in splits.items():
            builder = _SplitBuilder(config, tokenizer, objective)
            for start in range(0, len(records), CHUNK):
                builder.add(records[start : start + CHUNK])
                advance(min(CHUNK, len(records) - start))
            reports[name] = builder.write(folder / name)
    num_leaked = 0
    if "validation" in splits:
        known = set(prompts_in(folder / "train/questions.jsonl"))
        num_leaked = sum(prompt in known for prompt in prompts_in(folder / "validation/questions.jsonl"))
    report = DataReport(train=reports["train"], validation=reports.get("validation"), num_leaked=num_leaked)
    (folder / "report.json").write_bytes(orjson.dumps(report.as_dict()))


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts records done."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):  # in a log file rich leaves an empty line
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Tokenising records", total=total)
        yield lambda count: progress.advance(task, count)


class _SplitBuilder:
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
        store = _open(folder, self.config)
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
