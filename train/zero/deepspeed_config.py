"""DeepSpeed's config from Tunesmith's. The one place where its spellings stand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from tunesmith.train.config.config import Config, EngineConfig, Offload, Precision
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import resolve_path
from tunesmith.train.redact import redact

FP32_STATE = "Tunesmith, which keeps master weights and moments in fp32"
NEVER_APPLIED = "Tunesmith, which never applies a gradient that is not finite"
DIVIDED = "Tunesmith's loop, which divides by the tokens that count"
UPLOADS = "track.wandb, which uploads no secret; DeepSpeed's own upload takes the command line too"

# What our own settings decide; a raw key that says otherwise would be ignored or would break the loss.
OWNED = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size and batch.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_param.device": "engine.offload_weights",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "bf16.bf16_master_weights_and_grads": FP32_STATE,
    "bf16.bf16_optimizer_states": FP32_STATE,
    "fp16.fp16_master_weights_and_grads": FP32_STATE,
    "bf16.check_grad_overflow": NEVER_APPLIED,
    "zero_optimization.compute_grad_norm": NEVER_APPLIED,
    "managed_gradient_accumulation": "Tunesmith's loop",
    "prescale_gradients": DIVIDED,
    "gradient_predivide_factor": DIVIDED,
    "gradient_allreduce_op": DIVIDED,
    "wandb": UPLOADS,
    "comet": UPLOADS,
}


# Elements of a gradient bucket, which DeepSpeed sums over the ranks while the backward goes on. The derivation and its
# assumptions: docs/scaling.md.
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's own; it holds up to two buffers of it, whatever there is to sum
LEAST_BUCKET = 4_000_000  # 16 MB in fp32: below, latency costs more than bytes do
GOOD_BUCKET = 50_000_000  # 200 MB in fp32: above, nothing is gained, and the last bucket hides behind nothing
BUCKETS = 8  # so that the first sums start when an eighth of the gradients is there


# Names that a misspelt one is measured against; others are let through, as DeepSpeed has many and adds more.
SECTIONS = [
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "bf16", "fp16", "amp", "zero_optimization", "communication_data_type", "data_types"),
    *("prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "activation_checkpointing", "aio"),
    *("wall_clock_breakdown", "steps_per_print", "flops_profiler", "comms_logger", "memory_breakdown", "dump_state"),
    *("data_efficiency", "compression_training", "sparse_attention", "checkpoint", "elasticity", "autotuning"),
    *("tensorboard", "wandb", "csv_monitor", "torch_autocast", "tensor_parallel", "compile", "nebula"),
    *("managed_gradient_accumulation", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
]


def check(config: Config, world_size: int) -> None:
    """Raises ConfigError when the batch does not divide over the ranks or a raw key contradicts our settings."""
    deepspeed_config(config, world_size)


def deepspeed_config(config: Config, world_size: int, trained: Sequence[int] = ()) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize. Raises ConfigError when a raw key contradicts our settings.

    trained: elements of each parameter that is trained; without them buckets are DeepSpeed's.
    """
    owned = _owned(config, world_size)
    if trained and zero_stage(config.engine):
        owned["zero_optimization"]["reduce_bucket_size"] = reduce_bucket_size(trained)
    _check_no_secret(config.engine.deepspeed)
    _check_raw(config.engine.deepspeed, owned)
    tree = _merged(owned, config.engine.deepspeed)
    return tree | {"gradient_clipping": 0.0} if is_plain_fp32(config.engine) else tree


def is_plain_fp32(engine: EngineConfig) -> bool:
    """True where DeepSpeed steps torch's optimizer itself: it reports no norm there, skips no step, and its clipping
    fails without gradients (0.19.8), so the engine does all three.
    """
    return engine.stage == 0 and engine.precision is Precision.fp32


def _owned(config: Config, world_size: int) -> dict[str, Any]:
    batch, engine = config.batch, config.engine
    accumulation = batch.gradient_accumulation_steps(world_size)
    tree: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        "zero_optimization": _zero(engine, world_size),
        "bf16": {
            "enabled": engine.precision is Precision.bf16,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {
            "enabled": engine.precision is Precision.fp16,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "fp16_master_weights_and_grads": False,
        },
        "managed_gradient_accumulation": True,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": True,
    }
    if engine.precision is not Precision.fp32:
        tree["communication_data_type"] = "fp32"  # sums over ranks keep the bits that bf16 would drop
        if engine.precision is Precision.bf16 and accumulation > 1:
            tree["data_types"] = {"grad_accum_dtype": "fp32"}
    return tree


def zero_stage(engine: EngineConfig) -> int:
    """The stage that DeepSpeed runs.

    fp16 and bf16 at ZeRO 0 run as ZeRO 1. DeepSpeed 0.19.8 unscales fp16 gradients there whose loss it never scaled
    (https://github.com/deepspeedai/DeepSpeed/pull/8393; that can go when a release holds it), and it adds up the bf16
    gradients of micro batches in bf16, whatever grad_accum_dtype says (tests/train/zero/test_gradient_sums.py).
    """
    return engine.stage if engine.precision is Precision.fp32 else max(engine.stage, 1)


def _zero(engine: EngineConfig, world_size: int) -> dict[str, Any]:
    stage = zero_stage(engine)
    zero: dict[str, Any] = {"stage": stage, "compute_grad_norm": True}
    if stage:
        zero["overlap_comm"] = world_size > 1  # alone it would add a buffer and a wait for a stream after each backward
        zero["contiguous_gradients"] = True
    if engine.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = _offload(engine.offload_optimizer, engine.nvme_path)
    if engine.offload_weights is not Offload.none:
        zero["offload_param"] = _offload(engine.offload_weights, engine.nvme_path)
    return zero


def _offload(where: Offload, nvme_path: str | None) -> dict[str, Any]:
    tree: dict[str, Any] = {"device": str(where), "pin_memory": True}
    return tree | ({"nvme_path": nvme_path and resolve_path(nvme_path)} if where is Offload.nvme else {})


def reduce_bucket_size(trained: Sequence[int]) -> int:
    """Elements of a gradient bucket: an eighth of all within limits, and every parameter that fits DeepSpeed's own
    bucket fits ours, as larger ones are summed by themselves, past the buffers.
    """
    total = sum(trained)
    largest = max(size for size in (*trained, 0) if size <= DEFAULT_BUCKET)
    return min(total, max(LEAST_BUCKET, largest, min(GOOD_BUCKET, total // BUCKETS)), DEFAULT_BUCKET)


@contextmanager
def raw_keys_explained(config: Config) -> Iterator[None]:
    """Around DeepSpeed's reading of its config: a raw key or value that it refuses becomes a ConfigError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        found = [key for key in _raw_names(config.engine.deepspeed) if key.endswith(name)]
        raise ConfigError(
            f"DeepSpeed refuses {name}: {first['msg']}.",
            key=f"engine.deepspeed.{found[0]}" if found else "engine",
            do="correct the raw key or its value, or drop it.",
        ) from None


def _raw_names(raw: dict[str, Any], prefix: str = "") -> list[str]:
    names = [f"{prefix}{name}" for name in raw]
    for name, value in raw.items():
        names += _raw_names(value, f"{prefix}{name}.") if isinstance(value, dict) else []
    return names


def _check_no_secret(raw: dict[str, Any], prefix: str = "engine.deepspeed") -> None:
    """DeepSpeed writes its config into every checkpoint, and needs no secret itself."""
    for name, clean in redact(raw).items():
        if clean == raw[name]:
            continue
        if isinstance(raw[name], dict) and isinstance(clean, dict):
            _check_no_secret(raw[name], f"{prefix}.{name}")
        raise ConfigError(
            f"{prefix}.{name} holds a secret, which DeepSpeed would write into every checkpoint.",
            key=f"{prefix}.{name}",
            do="take it out; what needs a secret reads it from the environment.",
        )


def _check_raw(raw: dict[str, Any], owned: dict[str, Any], prefix: str = "") -> None:
    for name, value in raw.items():
        key = f"{prefix}{name}"
        close = get_close_matches(name, SECTIONS, n=1, cutoff=0.8) if not prefix and name not in SECTIONS else []
        if close:  # DeepSpeed passes over a top-level key that it does not know
            raise ConfigError(
                f"DeepSpeed has no {name!r}. Did you mean {close[0]}?",
                key=f"engine.deepspeed.{name}",
                do=f"write engine.deepspeed.{close[0]}.",
            )
        if key in OWNED and (key in ("optimizer", "scheduler") or value != owned.get(name)):
            mine = f", which makes it {owned[name]}" if name in owned else ""
            raise ConfigError(
                f"engine.deepspeed.{key}={value} contradicts {OWNED[key]}{mine}.",
                key=f"engine.deepspeed.{key}",
                do=f"drop the raw key and set {OWNED[key]}.",
            )
        if isinstance(owned.get(name), dict) and not isinstance(value, dict):
            raise ConfigError(
                f"engine.deepspeed.{key}={value} is a section with settings of its own.",
                key=f"engine.deepspeed.{key}",
                do=f"set one of them, such as engine.deepspeed.{key}.{next(iter(owned[name]))}.",
            )
        if isinstance(value, dict) and isinstance(owned.get(name, {}), dict):
            _check_raw(value, owned.get(name, {}), f"{key}.")


def _merged(owned: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    tree = dict(owned)
    for name, value in raw.items():
        nested = isinstance(value, dict) and isinstance(tree.get(name), dict)
        tree[name] = _merged(tree[name], value) if nested else value
    return tree
