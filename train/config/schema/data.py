"""Where the examples come from, and how they are rendered."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tunesmith.train.config.schema.checks import (
    as_list,
    check_fraction,
    check_no_empty_text,
    check_not_negative,
    check_strings,
)
from tunesmith.train.errors import ConfigError


class Truncate(StrEnum):
    error = "error"
    drop = "drop"
    left_of_prompt = "left_of_prompt"


@dataclass(kw_only=True)
class DataConfig:
    """Where the examples come from and how they are rendered."""

    train: Any  # file (.jsonl, .jsonl.gz), folder, glob, hub:<dataset id>[:<split>], or a list of these
    validation: Any = field(default_factory=list)  # the same forms; empty: none, or validation_fraction
    validation_fraction: float = 0.0  # share of the training records held out, drawn with `seed`
    truncate: Truncate = Truncate.error  # what happens to a record longer than batch.sequence_length
    chat_template: str = "auto"  # auto: the tokenizer's, else ChatML; raw: prompt + completion; or a .jinja file
    cache_dir: str | None = None  # tokenised records; null: $XDG_CACHE_HOME/tunesmith or ~/.cache/tunesmith
    preview: int = 2  # records printed at the start with their targets coloured

    def __post_init__(self) -> None:
        check_strings("data.train", self.train)
        check_strings("data.validation", self.validation)
        check_fraction("data", validation_fraction=self.validation_fraction)
        check_not_negative("data", preview=self.preview)
        check_no_empty_text(self, "data.")
        if not self.train_sources:
            raise ConfigError("there is no training data.", key="data.train", do="set data.train to a JSONL file.")
        if self.validation_sources and self.validation_fraction:
            raise ConfigError(
                "data.validation and data.validation_fraction are both set.",
                key="data.validation_fraction",
                do="keep one of them: a file of its own, or a share of the training records.",
            )

    @property
    def train_sources(self) -> list[str]:
        return as_list(self.train)

    @property
    def validation_sources(self) -> list[str]:
        return as_list(self.validation)
