"""The model that is fine-tuned."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tunesmith.train.config.schema.checks import check_bool, check_no_empty_text, check_not_negative
from tunesmith.train.errors import ConfigError


class Attention(StrEnum):
    auto = "auto"
    segments = "segments"
    eager = "eager"
    sdpa = "sdpa"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


@dataclass(kw_only=True)
class ModelConfig:
    """The model to fine-tune and how it is held."""

    name_or_path: str  # hub id, folder, or conf://<folder> for one that ships with Tunesmith
    revision: str | None = None  # hub branch, tag or commit; pin a commit for a run that can be repeated
    random_weights: bool = False  # weights drawn from the model's config and `seed`; for tests and the demo
    trust_remote_code: Any = False  # lets code from the model's folder run; true or false, nothing else
    attention: Attention = Attention.auto  # segments: ours, without a mask; auto: that or what transformers picks
    resize_embeddings: bool = False  # adds rows for ids of the tokenizer that the model has none for, and trains them
    router_aux_loss_coef: float | None = None  # weight of the routers' auxiliary loss, 0: none, null: as in config.json

    def __post_init__(self) -> None:
        check_bool("model.trust_remote_code", self.trust_remote_code)
        if not self.name_or_path.strip():
            raise ConfigError("the model has no name.", key="model.name_or_path", do="give a hub id or a folder.")
        check_no_empty_text(self, "model.")
        check_not_negative("model", router_aux_loss_coef=self.router_aux_loss_coef or 0)
