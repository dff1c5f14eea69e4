"""DeepSpeed's config from ours. The one place where its spellings stand."""

from typing import Any

from tunesmith.train.config import Config, EngineConfig, Offload, Precision
from tunesmith.train.errors import ConfigError

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
    "managed_gradient_accumulation": "Tunesmith's loop",
    "prescale_gradients": "Tunesmith's loop, which divides by the tokens that count",
    "gradient_predivide_factor": "Tunesmith's loop, which divides by the tokens that count",
}


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize. Raises ConfigError when a raw key contradicts our settings."""
    ours = _ours(config, world_size)
    _check_raw(config.engine.deepspeed, ours)
    return _merged(ours, config.engine.deepspeed)


def _ours(config: Config, world_size: int) -> dict[str, Any]:
    batch, engine = config.batch, config.engine
    accumulation = batch.gradient_accumulation_steps(world_size)
    tree: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        "zero_optimization": _zero(engine),
        "bf16": {"enabled": engine.precision is Precision.bf16},
        "fp16": {"enabled": engine.precision is Precision.fp16, "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": True,
    }
    if engine.precision is not Precision.fp32:
        tree["communication_data_type"] = "fp32"  # sums over ranks keep the bits that bf16 would drop
        if engine.stage > 0 and engine.precision is Precision.bf16 and accumulation > 1:
            tree["data_types"] = {"grad_accum_dtype": "fp32"}
    return tree


def _zero(engine: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": engine.stage}
    if engine.stage:
        zero["overlap_comm"] = True
        zero["contiguous_gradients"] = True
    if engine.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = _offload(engine.offload_optimizer, engine.nvme_path)
    if engine.offload_weights is not Offload.none:
        zero["offload_param"] = _offload(engine.offload_weights, engine.nvme_path)
    return zero


def _offload(where: Offload, nvme_path: str | None) -> dict[str, Any]:
    tree: dict[str, Any] = {"device": str(where), "pin_memory": True}
    return tree | ({"nvme_path": nvme_path} if where is Offload.nvme else {})


def _check_raw(raw: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> None:
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if key in OWNED and (key in ("optimizer", "scheduler") or value != ours.get(name)):
            mine = f", which makes it {ours[name]}" if name in ours else ""
            raise ConfigError(
                f"engine.deepspeed.{key}={value} contradicts {OWNED[key]}{mine}.",
                key=f"engine.deepspeed.{key}",
                do=f"drop the raw key and set {OWNED[key]}.",
            )
        if isinstance(value, dict) and isinstance(ours.get(name, {}), dict):
            _check_raw(value, ours.get(name, {}), f"{key}.")


def _merged(ours: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    tree = dict(ours)
    for name, value in raw.items():
        nested = isinstance(value, dict) and isinstance(tree.get(name), dict)
        tree[name] = _merged(tree[name], value) if nested else value
    return tree
