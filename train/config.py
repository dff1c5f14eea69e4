"""What a run is: the schema of every config group, and the checks that one group or all of them must pass.

Composition (yaml files, overrides, error places) is `compose.py`; this file imports neither Hydra nor torch.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

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


class Packing(StrEnum):
    best_fit = "best_fit"
    none = "none"


class ScheduleKind(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Precision(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Offload(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Device(StrEnum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


def check_positive(group: str, **values: float | None) -> None:
    """Raises ConfigError for the first value that is given and not above 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, not {value}.", key=f"{group}.{name}")


def check_fraction(group: str, **values: float) -> None:
    """Raises ConfigError for the first value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, not {value}.", key=f"{group}.{name}")


def check_bool(key: str, value: object) -> None:
    """Raises ConfigError unless value is a real bool: 'maybe', null and 1 are mistakes, not a yes."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, not {value!r}.", key=key)


def as_list(value: Any) -> list[str]:
    """One string or a list of strings, as a list."""
    return [value] if isinstance(value, str) else list(value)


def check_strings(key: str, value: object) -> None:
    """Raises ConfigError unless value is a string or a list of non-empty strings."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) and item for item in strings):
        raise ConfigError(f"{key} must be a path or a list of paths, not {value!r}.", key=key)


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


@dataclass(kw_only=True)
class DataConfig:
    """Where the examples come from and how they are rendered."""

    train: Any  # file (.jsonl, .jsonl.gz), folder, glob, hub:<dataset id>[:<split>], or a list of these
    validation: Any = field(
        default_factory=list
    )  # the same; empty: none, or validation_fraction of the training records
    validation_fraction: float = 0.0  # share of the training records held out, drawn with `seed`
    truncate: Truncate = Truncate.error  # what happens to a record longer than batch.sequence_length
    chat_template: str = (
        "auto"  # auto: the tokenizer's own, else ChatML; raw: prompt + completion as they are; or a .jinja file
    )
    cache_dir: str | None = None  # tokenised records; null: $XDG_CACHE_HOME/tunesmith or ~/.cache/tunesmith
    preview: int = 2  # records printed at the start with their targets coloured

    def __post_init__(self) -> None:
        check_strings("data.train", self.train)
        check_strings("data.validation", self.validation)
        check_fraction("data", validation_fraction=self.validation_fraction)
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


@dataclass(kw_only=True)
class AdapterConfig:
    """Which weights are trained: all of them, LoRA matrices beside them, or the last blocks."""

    kind: AdapterKind
    r: int | None = None  # rank of the LoRA matrices
    alpha: float | None = None  # LoRA scale: alpha / r, or alpha / sqrt(r) with use_rslora
    dropout: float = 0.0  # on the input of the LoRA matrices
    target_modules: Any = "all-linear"  # all-linear (every linear layer but the head), or a list of module names
    use_rslora: bool = False  # rank-stabilised scale, arXiv:2312.03732
    use_dora: bool = False  # weight-decomposed LoRA, arXiv:2402.09353
    num_layers: int | None = None  # blocks trained, counted from the top, for last_layers

    def __post_init__(self) -> None:
        check_positive("adapter", r=self.r, alpha=self.alpha, num_layers=self.num_layers)
        check_fraction("adapter", dropout=self.dropout)
        check_strings("adapter.target_modules", self.target_modules)
        if self.kind is AdapterKind.lora and (self.r is None or self.alpha is None):
            raise ConfigError(
                "a LoRA adapter needs r and alpha.", key="adapter.r", do="set adapter.r and adapter.alpha."
            )
        if self.kind is not AdapterKind.lora and (self.r, self.alpha, self.dropout) != (None, None, 0.0):
            raise ConfigError(
                f"adapter.r, alpha and dropout mean nothing with adapter.kind={self.kind}.",
                key="adapter.r"
                if self.r is not None
                else "adapter.alpha"
                if self.alpha is not None
                else "adapter.dropout",
                do="choose adapter=lora, or leave them out.",
            )
        if (self.kind is AdapterKind.last_layers) != (self.num_layers is not None):
            raise ConfigError(
                f"adapter.num_layers={self.num_layers} does not go with adapter.kind={self.kind}.",
                key="adapter.num_layers",
                do="set adapter=last_layers adapter.num_layers=<n>, or neither.",
            )


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is learned."""

    targets: Targets = Targets.all_turns  # every assistant turn of a conversation, or only its last


@dataclass(kw_only=True)
class BatchConfig:
    """How examples become batches."""

    global_batch_size: int  # sequences per optimizer step, all ranks
    micro_batch_size: int  # sequences per forward, one rank
    sequence_length: int  # tokens in one sequence at most
    packing: Packing = Packing.best_fit  # best_fit: several records fill one sequence; none: one record a sequence

    def __post_init__(self) -> None:
        check_positive(
            "batch",
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
        )

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Forwards per optimizer step on each rank. Raises ConfigError when the global batch does not divide."""
        forward = self.micro_batch_size * world_size
        if self.global_batch_size % forward:
            below = self.global_batch_size // forward * forward
            sizes = f"{below} or {below + forward}" if below else f"{forward}"
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} does not divide into forwards of {forward} sequences "
                f"(micro_batch_size={self.micro_batch_size} x world_size={world_size}).",
                key="batch.global_batch_size",
                do=f"set batch.global_batch_size to {sizes}, or change batch.micro_batch_size.",
            )
        return self.global_batch_size // forward


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW; no decay on norms, biases and embeddings."""

    learning_rate: float  # at the top of the schedule
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # global L2 norm the gradient is clipped to; null: no clipping
    max_skipped_steps: int = 10  # steps in a row with a non-finite loss or gradient before the run ends

    def __post_init__(self) -> None:
        check_positive(
            "optimizer",
            learning_rate=self.learning_rate,
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
            max_skipped_steps=self.max_skipped_steps,
        )
        check_fraction("optimizer", beta1=self.beta1, beta2=self.beta2)
        if self.weight_decay < 0:
            raise ConfigError("weight_decay must not be negative.", key="optimizer.weight_decay")


@dataclass(kw_only=True)
class ScheduleConfig:
    """How long the run is, and the learning rate over it."""

    kind: ScheduleKind
    epochs: float | None = None  # passes over the training data; this or max_steps
    max_steps: int | None = None  # optimizer steps; this or epochs
    warmup_fraction: float = 0.0  # share of the steps over which the learning rate rises from 0
    decay_fraction: float = 0.2  # wsd: share of the steps, at the end, over which it falls
    final_fraction: float = 0.0  # learning rate at the end, as a share of the top; linear, cosine and wsd

    def __post_init__(self) -> None:
        check_positive("schedule", epochs=self.epochs, max_steps=self.max_steps)
        check_fraction("schedule", warmup_fraction=self.warmup_fraction, final_fraction=self.final_fraction)
        if (self.epochs is None) == (self.max_steps is None):
            raise ConfigError(
                f"schedule.epochs={self.epochs} and schedule.max_steps={self.max_steps}: exactly one must be set.",
                key="schedule.max_steps",
                do="set one and put null for the other, such as schedule.epochs=null schedule.max_steps=500.",
            )
        if self.kind is ScheduleKind.wsd and not 0 < self.decay_fraction <= 1 - self.warmup_fraction:
            raise ConfigError(
                f"decay_fraction={self.decay_fraction} must be above 0 and leave room for "
                f"warmup_fraction={self.warmup_fraction}.",
                key="schedule.decay_fraction",
            )


@dataclass(kw_only=True)
class EngineConfig:
    """DeepSpeed ZeRO: what is sharded over the ranks, what is offloaded, and the number format."""

    stage: int  # 0: nothing sharded; 1: optimizer state; 2: + gradients; 3: + weights
    precision: Precision = Precision.bf16  # of weights and activations; master weights and moments are always fp32
    offload_optimizer: Offload = Offload.none  # where the optimizer state lives
    offload_weights: Offload = Offload.none  # where the weights live; stage 3 only
    nvme_path: str | None = None  # folder on a local NVMe disk, for offload to nvme
    deepspeed: dict[str, Any] = field(default_factory=dict)  # raw DeepSpeed keys, added to ours

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"ZeRO stages are 0 to 3, not {self.stage}.", key="engine.stage")
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


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the whole state of the run is saved, and what is kept."""

    every_steps: int | None = None  # null: only at the end
    at_end: bool = True  # a checkpoint after the last step, from which the run can be extended
    keep_last: int = 2  # newest checkpoints kept; the one with the best eval loss is kept besides

    def __post_init__(self) -> None:
        check_positive("checkpoint", every_steps=self.every_steps, keep_last=self.keep_last)


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured on the validation records."""

    every_steps: int | None = None  # null: only at the end
    batch_size: int = 8  # sequences per forward, one rank; does not change the figures
    generate: bool = True  # greedy answers at the end: exact match and ROUGE-L
    max_new_tokens: int = 256  # tokens in one generated answer at most
    max_records: int | None = None  # validation records answered; null: all
    num_samples: int = 8  # answers shown in the report and in W&B
    patience: int | None = None  # evaluations without a better loss before the run stops early; null: never

    def __post_init__(self) -> None:
        check_positive(
            "evaluate",
            every_steps=self.every_steps,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            max_records=self.max_records,
            patience=self.patience,
        )


@dataclass(kw_only=True)
class TrackConfig:
    """Where the numbers go besides the run folder."""

    wandb: WandbMode = WandbMode.auto  # auto: online with an API key, offline without one
    project: str = "tunesmith"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    every_steps: int = 1  # steps between two rows in metrics.jsonl and W&B

    def __post_init__(self) -> None:
        check_positive("track", every_steps=self.every_steps)


@dataclass(kw_only=True)
class ProfileConfig:
    """A torch.profiler trace of some steps of rank 0, written to <run>/profile/."""

    start_step: int | None = None  # first step recorded; null: no profile
    num_steps: int = 3

    def __post_init__(self) -> None:
        check_positive("profile", start_step=self.start_step, num_steps=self.num_steps)


@dataclass(kw_only=True)
class ClusterConfig:
    """The machines the run is on."""

    device: Device = Device.auto  # auto: GPUs where there are any
    timeout_minutes: float = 10.0  # a collective that takes longer ends the run

    def __post_init__(self) -> None:
        check_positive("cluster", timeout_minutes=self.timeout_minutes)


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    name: str = "run"  # of the run: its folder, its W&B name
    seed: int = 0  # of the data order, the split, random weights and dropout
    output_dir: str | None = None  # the run folder; null: runs/<name>-<date>-<time>
    resume: str = (
        "auto"  # auto: from output_dir's newest checkpoint if it has one; never; or a run folder or checkpoint
    )
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig
    objective: ObjectiveConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    track: TrackConfig
    profile: ProfileConfig
    cluster: ClusterConfig

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"{self.name!r} cannot name a folder.", key="name", do="use letters, digits, - and _.")
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
