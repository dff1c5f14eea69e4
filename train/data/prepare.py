"""Records -> packed token stores, once for each combination of what they depend on, before any process group exists."""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedTokenizerBase

from tunesmith.train.config.config import Config, Packing
from tunesmith.train.data.cache import cache_folder, open_or_build
from tunesmith.train.data.example import MakesExamples
from tunesmith.train.data.questions import Question, prompts_in, read_questions
from tunesmith.train.data.records import Record, read_records
from tunesmith.train.data.report import DataReport, SplitReport
from tunesmith.train.data.sources import Source, find_sources
from tunesmith.train.data.split_builder import SplitBuilder
from tunesmith.train.data.store import TokenStore
from tunesmith.train.errors import DataError
from tunesmith.train.files.manifest import plain
from tunesmith.train.paths import resolve_path
from tunesmith.train.ranks.distributed import broadcast_text, first_problem, world_from_environment

FORMAT_VERSION = 2  # raise it when the same input gives other arrays
CHUNK = 1000  # records rendered and tokenised together
# What of _settings() no other name of a run's identity says, in a user's words.
PARTS = {
    "format": "the format of prepared data",
    "versions": "transformers and tokenizers",
    "tokenizer": "the tokenizer",
    "special_tokens": "the special tokens",
    "chat_template": "the chat template",
    "validation_fraction": "data.validation_fraction",
    "truncate": "data.truncate",
    "objective": "the objective's code",
    "train": "the content of data.train",
    "validation": "the content of data.validation",
    "train_names": "the list of data.train's files",
    "validation_names": "the list of data.validation's files",
}

__all__ = ["DataReport", "PreparedData", "Question", "SplitReport", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, memory-mapped."""

    train: TokenStore
    validation: TokenStore | None
    questions: list[Question]  # of the validation split
    report: DataReport
    fingerprint: str  # of everything the arrays depend on
    parts: dict[str, str]  # what it is made of: name -> a short value or a digest; empty for data of before 2026-12
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
    settings = _settings(config, tokenizer, objective)
    show = show_progress and world_from_environment().local_rank == 0

    def plan() -> tuple[str, Callable[[Path], None]]:
        train, validation = (_pinned(names) for names in (config.data.train_sources, config.data.validation_sources))
        content = _content(settings, train, validation)

        def build(empty: Path) -> None:
            _build(empty, train, validation, config, tokenizer, objective, show)
            (empty / "parts.json").write_bytes(orjson.dumps(_parts(content)))

        return _hash(content), build

    places = [[_place(name) for name in split] for split in (config.data.train_sources, config.data.validation_sources)]
    folder = open_or_build(
        cache_folder(config.data.cache_dir),
        _hash({**settings, "data": places}),
        plan,
        lambda total: _progress(show, total, "Checking prepared data", DownloadColumn(binary_units=True)),
    )
    has_validation = (folder / "validation").is_dir()
    return PreparedData(
        train=_open(folder / "train", config),
        validation=_open(folder / "validation", config) if has_validation else None,
        questions=read_questions(folder / "validation/questions.jsonl", tokenizer) if has_validation else [],
        report=DataReport.from_dict(orjson.loads((folder / "report.json").read_bytes())),
        fingerprint=folder.name,
        parts=orjson.loads(parts.read_bytes()) if (parts := folder / "parts.json").is_file() else {},
        _read_train_questions=lambda: read_questions(folder / "train/questions.jsonl", tokenizer),
    )


def fingerprint(
    config: Config, tokenizer: PreTrainedTokenizerBase, objective: MakesExamples
) -> tuple[str, dict[str, str]]:
    """The fingerprint of the data as it is now and its parts, without preparing it: the sources are digested."""
    sources = (_pinned(names) for names in (config.data.train_sources, config.data.validation_sources))
    content = _content(_settings(config, tokenizer, objective), *sources)
    return _hash(content), _parts(content)


def check_same_data(fingerprint: str, device: torch.device) -> None:
    """Every rank calls it with what it has prepared. Raises DataError, the same on all, when ranks have other data."""
    own = fingerprint == broadcast_text(fingerprint, device)
    if problem := first_problem("" if own else f"{fingerprint}, rank 0 has another", device):
        raise DataError(
            f"ranks have prepared other data: {problem}.",
            at="data.train",
            do="see that no file changes while the run starts, and that all nodes hold the same files.",
        )


def _settings(config: Config, tokenizer: PreTrainedTokenizerBase, objective: MakesExamples) -> dict[str, Any]:
    """Everything the prepared arrays depend on but the data."""
    backend = orjson.loads(tokenizer.backend_tokenizer.to_str())
    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "versions": [transformers.__version__, tokenizers.__version__],
        "tokenizer": {name: value for name, value in backend.items() if name not in ("truncation", "padding")},
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
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
    return parts


def _content(settings: dict[str, Any], train: list[Source], validation: list[Source]) -> dict[str, Any]:
    content = [[(source.name, source.expected) for source in split] for split in (train, validation)]
    return {**settings, "train": content[0], "validation": content[1]}


def _parts(content: dict[str, Any]) -> dict[str, str]:
    split = {name: [digest for _, digest in content[name]] for name in ("train", "validation")}
    split |= {f"{name}_names": [file for file, _ in content[name]] for name in ("train", "validation")}
    written = {name: str(plain((content | split)[key])) for key, name in PARTS.items() if key in content | split}
    return {
        name: text if len(text) <= 40 and text.isprintable() else _hash({name: text})[:8]
        for name, text in written.items()
    }


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def _place(name: str) -> str:
    return str(Path(resolve_path(name)).absolute())


def _pinned(names: list[str]) -> list[Source]:
    """The sources under some names with digests of their content, which reading them must meet again."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(Source.pinned, find_sources(names)))


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
    folder: Path,
    train: list[Source],
    validation: list[Source],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    objective: MakesExamples,
    show_progress: bool,
) -> None:
    splits = {"train": read_records(train)}
    if validation:
        splits["validation"] = read_records(validation)
    elif config.data.validation_fraction:
        splits["train"], splits["validation"] = split_records(
            splits["train"], config.data.validation_fraction, config.seed
        )
    reports: dict[str, SplitReport] = {}
    with _progress(
        show_progress, sum(map(len, splits.values())), "Tokenising records", MofNCompleteColumn()
    ) as advance:
        for name, records in splits.items():
            builder = SplitBuilder(config, tokenizer, objective)
            for start in range(0, len(records), CHUNK):
                builder.add(records[start : start + CHUNK])
                advance(min(CHUNK, len(records) - start))
                os.utime(folder)  # a sign of life, which cache.py asks for
            reports[name] = builder.write(folder / name)
    num_leaked = 0
    if "validation" in splits:
        known = set(prompts_in(folder / "train/questions.jsonl"))
        num_leaked = sum(prompt in known for prompt in prompts_in(folder / "validation/questions.jsonl"))
    report = DataReport(train=reports["train"], validation=reports.get("validation"), num_leaked=num_leaked)
    (folder / "report.json").write_bytes(orjson.dumps(report.as_dict()))


@contextmanager
def _progress(show: bool, total: int, words: str, count: ProgressColumn) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts what is done."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):  # in a log file rich leaves an empty line
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(words, total=total)
        yield lambda count: progress.advance(task, count)
