"""Which weights are trained."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tunesmith.train.config.schema.checks import check_fraction, check_positive, check_strings
from tunesmith.train.errors import ConfigError


class AdapterKind(StrEnum):
    none = "none"
    lora = "lora"
    last_layers = "last_layers"


ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class AdapterConfig:
    """Which weights are trained: all of them, LoRA matrices beside them, or the last blocks."""

    kind: AdapterKind  # none: every weight; lora: matrices beside the weights (PEFT); last_layers: the top blocks
    r: int | None = None  # rank of the LoRA matrices
    alpha: float | None = None  # LoRA scale: alpha / r, or alpha / sqrt(r) with use_rslora
    dropout: float = 0.0  # on the input of the LoRA matrices
    target_modules: Any = ALL_LINEAR  # all-linear (every matrix but embeddings, head, routers), or names
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
