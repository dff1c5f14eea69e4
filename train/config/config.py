"""What a run is: one dataclass with a group for each concept, and the rules that span groups.

Each group has a file in schema/, named as its folder in conf/. `compose.py` makes a Config of yaml files and overrides;
nothing here imports Hydra or torch.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from tunesmith.train.config.schema.adapter import AdapterConfig, AdapterKind
from tunesmith.train.config.schema.batch import BatchConfig, Packing
from tunesmith.train.config.schema.checkpoint import CheckpointConfig
from tunesmith.train.config.schema.checks import check_no_empty_text
from tunesmith.train.config.schema.cluster import ClusterConfig, ClusterKind, ContainerRuntime, Device
from tunesmith.train.config.schema.data import DataConfig, Truncate
from tunesmith.train.config.schema.engine import EngineConfig, Offload, Precision
from tunesmith.train.config.schema.evaluate import EvaluateConfig
from tunesmith.train.config.schema.memory import MemoryConfig
from tunesmith.train.config.schema.model import Attention, ModelConfig
from tunesmith.train.config.schema.objective import ObjectiveConfig, Targets
from tunesmith.train.config.schema.optimizer import OnSpike, OptimizerConfig
from tunesmith.train.config.schema.profile import ProfileConfig
from tunesmith.train.config.schema.resume import ResumeConfig
from tunesmith.train.config.schema.schedule import ScheduleConfig, ScheduleKind
from tunesmith.train.config.schema.track import TrackConfig, WandbMode
from tunesmith.train.errors import ConfigError

__all__ = [
    "AdapterConfig",
    "AdapterKind",
    "Attention",
    "BatchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ClusterKind",
    "Config",
    "ContainerRuntime",
    "DataConfig",
    "Device",
    "EngineConfig",
    "EvaluateConfig",
    "Kernels",
    "MemoryConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "Offload",
    "OnSpike",
    "OptimizerConfig",
    "Packing",
    "Precision",
    "ProfileConfig",
    "ResumeConfig",
    "ScheduleConfig",
    "ScheduleKind",
    "Targets",
    "TrackConfig",
    "Truncate",
    "WandbMode",
]

MAX_SEED = 2**32 - 1  # what NumPy takes
MAX_NAME = 100  # characters: a file name holds 255 bytes, and the date is added to it
FOLDER_NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*")


class Kernels(StrEnum):
    auto = "auto"
    triton = "triton"
    torch = "torch"
    off = "off"


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    name: str = "run"  # of the run: its folder, its W&B name
    seed: int = 0  # of the data order, the split, random weights and dropout
    output_dir: str | None = None  # the run folder; null: runs/<name>-<date>-<time>
    kernels: Kernels = Kernels.auto  # of loss and LoRA: triton; torch; auto: triton on a GPU, else torch; off: neither
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig
    objective: ObjectiveConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    engine: EngineConfig
    memory: MemoryConfig
    checkpoint: CheckpointConfig
    resume: ResumeConfig
    evaluate: EvaluateConfig
    track: TrackConfig
    profile: ProfileConfig
    cluster: ClusterConfig

    def __post_init__(self) -> None:
        if not FOLDER_NAME.fullmatch(self.name) or len(self.name) > MAX_NAME:
            raise ConfigError(f"{self.name!r} cannot name a folder.", key="name", do="use letters, digits, - and _.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(
                f"seed={self.seed} is outside 0 to {MAX_SEED}.", key="seed", do="choose a seed from that range."
            )
        check_no_empty_text(self)
        self._check_evaluation()
        self._check_rollback()

    def _check_evaluation(self) -> None:
        has_validation = bool(self.data.validation_sources or self.data.validation_fraction)
        if self.evaluate.every_steps and not has_validation:
            raise ConfigError(
                "evaluate.every_steps is set but there are no validation records.",
                key="evaluate.every_steps",
                do="set data.validation or data.validation_fraction, or evaluate.every_steps=null.",
            )
        if self.evaluate.patience and not self.evaluate.every_steps:
            raise ConfigError(
                "early stopping needs evaluations.", key="evaluate.patience", do="set evaluate.every_steps."
            )

    def _check_rollback(self) -> None:
        saves = self.checkpoint.every_steps or self.checkpoint.every_minutes
        if self.optimizer.on_spike is OnSpike.rollback and not saves:
            raise ConfigError(
                "optimizer.on_spike=rollback needs checkpoints to go back to.",
                key="optimizer.on_spike",
                do="set checkpoint.every_steps or checkpoint.every_minutes.",
            )
