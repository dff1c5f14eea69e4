"""What learns what: the model, the data, which weights are trained, and on which tokens."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tunesmith.train.config.schema.checks import (
    as_list,
    check_bool,
    check_fraction,
    check_no_empty_text,
    check_not_negative,
    check_positive,
    check_strings,
)
from tunesmith.train.errors import ConfigError


class Attention(StrEnum):
    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


class AdapterKind(StrEnum):
    none = "none"
    lora = "lora"
    last_layers = "last_layers"


class Targets(StrEnum):
    all_turns = "all_turns"
    last_turn = "last_turn"


class Truncate(StrEnum):
    error = "error"
    drop = "drop"
    left_of_prompt = "left_of_prompt"


@dataclass(kw_only=True)
class ModelConfig:
    """The model to fine-tune and how it is held."""

    name_or_path: str  # hub id, folder, or conf://<folder> for one that ships with Tunesmith
    revision: str | None = None  # hub branch, tag or commit; pin a commit for a run that can be repeated
    random_weights: bool = False  # weights drawn from the model's config and `seed`; for tests and the demo
    trust_remote_code: Any = False  # lets code from the model's folder run; true or false, nothing else
    attention: Attention = Attention.auto  # auto: what transformers picks for the model
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, about 30 % more time

    def __post_init__(self) -> None:
        check_bool("model.trust_remote_code", self.trust_remote_code)
        if not self.name_or_path.strip():
            raise ConfigError("the model has no name.", key="model.name_or_path", do="give a hub id or a folder.")
        check_no_empty_text(self, "model.")


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


ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class AdapterConfig:
    """Which weights are trained: all of them, LoRA matrices beside them, or the last blocks."""

    kind: (
        AdapterKind  # none: every weight; lora: matrices beside the weights, through PEFT; last_layers: the top blocks
    )
    r: int | None = None  # rank of the LoRA matrices
    alpha: float | None = None  # LoRA scale: alpha / r, or alpha / sqrt(r) with use_rslora
    dropout: float = 0.0  # on the input of the LoRA matrices
    target_modules: Any = ALL_LINEAR  # all-linear (every linear layer but the head), or a list of module names
    use_rslora: bool = False  # rank-stabilised scale, arXiv:2312.03732
    use_dora: bool = False  # weight-decomposed LoRA, arXiv:2402.09353
    num_layers: int | None = None  # blocks trained, counted from the top, for last_layers

    def __post_init__(self) -> None:
        check_positive("adapter", r=self.r, alpha=self.alpha, num_layers=self.num_layers)
        check_fraction("adapter", dropout=self.dropout)
        check_strings("adapter.target_modules", self.target_modules, what="module name")
        if not self.target_modules:
            raise ConfigError(
                "adapter.target_modules is empty.", key="adapter.target_modules", do=f"name modules, or {ALL_LINEAR}."
            )
        if self.kind is AdapterKind.lora:
            self._check_rank_and_scale()
        else:
            self._check_no_lora_setting()
        if (self.kind is AdapterKind.last_layers) != (self.num_layers is not None):
            raise ConfigError(
                f"adapter.num_layers={self.num_layers} does not go with adapter.kind={self.kind}.",
                key="adapter.num_layers",
                do="set adapter=last_layers adapter.num_layers=<n>, or neither.",
            )

    def _check_rank_and_scale(self) -> None:
        for name, value in (("r", self.r), ("alpha", self.alpha)):
            if value is None:
                raise ConfigError(
                    f"a LoRA adapter needs {name}.", key=f"adapter.{name}", do="set adapter.r and adapter.alpha."
                )

    def _check_no_lora_setting(self) -> None:
        unset = {"r": None, "alpha": None, "dropout": 0.0, "target_modules": ALL_LINEAR}
        for name, default in {**unset, "use_rslora": False, "use_dora": False}.items():
            if getattr(self, name) != default:
                raise ConfigError(
                    f"adapter.{name}={getattr(self, name)} means nothing with adapter.kind={self.kind}.",
                    key=f"adapter.{name}",
                    do=f"choose adapter=lora, or leave adapter.{name} out.",
                )


OBJECTIVE_NAME = re.compile(r"[a-z][a-z0-9_]*")  # a module, so that a config can import nothing else


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is learned."""

    kind: str = "sft"  # the objective: a file of train/objective/, such as sft (next tokens of what the assistant says)
    targets: Targets = Targets.all_turns  # every assistant turn of a conversation, or only its last
    settings: dict[str, Any] = field(default_factory=dict)  # the objective's own settings, which its file checks

    def __post_init__(self) -> None:
        if not OBJECTIVE_NAME.fullmatch(self.kind):
            raise ConfigError(
                f"{self.kind!r} cannot name an objective.",
                key="objective.kind",
                do="write the name of a file of train/objective/, such as sft.",
            )
