"""What DeepSpeed shards and offloads, and in which number format."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tunesmith.train.config.schema.checks import check_no_empty_text
from tunesmith.train.errors import ConfigError


class Precision(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Offload(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(kw_only=True)
class EngineConfig:
    """DeepSpeed ZeRO: what is sharded over the ranks, what is offloaded, and the number format."""

    stage: int  # 0: nothing sharded; 1: optimizer state; 2: + gradients; 3: + weights
    precision: Precision = Precision.bf16  # of weights and activations; master weights and moments are always fp32
    offload_optimizer: Offload = Offload.none  # where the optimizer state lives
    offload_weights: Offload = Offload.none  # where the weights live; stage 3 only
    nvme_path: str | None = None  # folder on a local NVMe disk, for offload to nvme
    check_versions: bool = True  # before the first run with versions of DeepSpeed, torch, transformers nobody has tried
    deepspeed: dict[str, Any] = field(default_factory=dict)  # raw DeepSpeed keys, added to those that Tunesmith sets

    def __post_init__(self) -> None:
        check_no_empty_text(self, "engine.")
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(
                f"ZeRO stages are 0 to 3, not {self.stage}.",
                key="engine.stage",
                do="choose engine=ddp, zero1, zero2 or zero3.",
            )
        self._check_offload()

    def _check_offload(self) -> None:
        if self.offload_optimizer is not Offload.none and self.stage == 0:
            raise ConfigError(
                "offload needs ZeRO 1 or higher.", key="engine.offload_optimizer", do="set engine.stage to 1, 2 or 3."
            )
        if self.offload_weights is not Offload.none and self.stage != 3:
            raise ConfigError(
                "offloaded weights need ZeRO 3.", key="engine.offload_weights", do="set engine=zero3_offload."
            )
        if self.offload_optimizer is Offload.nvme and self.stage != 3:
            raise ConfigError("NVMe offload needs ZeRO 3.", key="engine.offload_optimizer", do="set engine=zero3_nvme.")
        nvme = Offload.nvme in (self.offload_optimizer, self.offload_weights)
        if nvme != (self.nvme_path is not None):
            raise ConfigError(
                "NVMe offload needs engine.nvme_path."
                if nvme
                else "engine.nvme_path is set but nothing is offloaded to nvme.",
                key="engine.nvme_path",
                do="set engine=zero3_nvme engine.nvme_path=/local/nvme, or neither.",
            )
