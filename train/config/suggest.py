"""Which setting a person meant: by its group, its initials, its name in other frameworks, or its spelling."""

import difflib
import re

CUTOFF = 0.6  # of difflib's ratio, for mistyped names
PEERS = {  # how transformers, TRL, DeepSpeed, torchtune, Axolotl and LLaMA-Factory spell our settings
    "name": "run_name experiment_name wandb_name",
    "output_dir": "output_folder output_path save_dir logging_dir dir",
    "resume.source": "resume_from_checkpoint auto_resume_from_checkpoints resume_from",
    "exp": "experiment recipe preset",
    "model.name_or_path": "model_name_or_path base_model model_name model_id model_path pretrained",
    "model.attention": "attn_implementation flash_attention flash_attn attn",
    "memory.recompute": "gradient_checkpointing activation_checkpointing use_activation_checkpointing",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_path data_path data_files file path",
    "data.validation": "validation_file eval_file eval_dataset test_file",
    "data.validation_fraction": "val_set_size val_size validation_split eval_split test_size",
    "data.cache_dir": "dataset_prepared_path",
    "data.truncate": "truncation",
    "adapter": "peft lora finetuning_type use_peft",
    "adapter.r": "rank lora_rank lora_dim",
    "adapter.kind": "adapter_type peft_type",
    "adapter.target_modules": "lora_target target_module modules",
    "adapter.num_layers": "freeze_trainable_layers num_trainable_layers",
    "batch.global_batch_size": "train_batch_size batch_size total_batch_size effective_batch_size "
    "gradient_accumulation_steps gradient_accumulation accumulation_steps",
    "batch.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu per_device_batch_size "
    "micro_batch per_gpu_train_batch_size",
    "batch.sequence_length": "max_seq_length max_seq_len seq_length seq_len max_length max_len block_size cutoff_len "
    "context_length model_max_length sequence_len",
    "batch.packing": "sample_packing pack packed",
    "optimizer": "optim",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon epsilon",
    "optimizer.max_grad_norm": "gradient_clipping clip_grad grad_clip gradient_clip_val clip max_norm",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "schedule.epochs": "num_train_epochs num_epochs max_epochs epoch",
    "schedule.max_steps": "max_train_steps total_steps max_iters num_steps num_training_steps",
    "schedule.warmup_fraction": "warmup_ratio warmup_steps num_warmup_steps warmup",
    "schedule.final_fraction": "min_lr min_lr_ratio min_lr_rate",
    "engine": "zero fsdp strategy",
    "engine.stage": "zero_stage zero_optimization",
    "engine.precision": "bf16 fp16 fp32 tf32 torch_dtype dtype mixed_precision",
    "engine.offload_optimizer": "cpu_offload offload",
    "engine.offload_weights": "offload_param offload_params",
    "checkpoint.every_steps": "save_steps save_every save_interval checkpoint_steps",
    "checkpoint.async_save": "async async_checkpointing async_save_checkpoint",
    "checkpoint.keep_last": "save_total_limit max_checkpoints keep_last_n",
    "evaluate.every_steps": "eval_steps eval_every eval_interval val_check_interval run_eval_every_n_steps",
    "evaluate.batch_size": "per_device_eval_batch_size eval_batch_size val_batch_size",
    "evaluate.metric": "metric_for_best_model best_metric monitor",
    "evaluate.patience": "early_stopping_patience",
    "evaluate.max_records": "max_eval_samples",
    "track": "report_to logger",
    "track.every_steps": "logging_steps log_every log_every_n_steps log_interval",
    "track.project": "wandb_project",
    "track.wandb": "wandb_mode use_wandb mode",
    "cluster.timeout_minutes": "ddp_timeout timeout",
}
SPELLINGS = {spelling: setting for setting, spellings in PEERS.items() for spelling in spellings.split()}


def suggest_key(key: str, known: list[str]) -> str | None:
    """The known key that was most likely meant by one that is not known; None rather than a wild guess.

    Args:
        known: every dotted key and every group.
    """
    group, _, inner = key.rpartition(".")
    leaf = (inner or key).lower()
    if leaf.startswith("_"):
        return None  # Hydra's own words, such as _target_, which name no setting
    settings = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    if not group:
        return (
            _peer(leaf, known) or nearest(key, known, cutoff=0.8) or _among(leaf, settings) or _stripped(leaf, settings)
        )
    own = nearest(group, [name.rpartition(".")[0] for name in settings if "." in name])
    siblings = [name for name in settings if name.rpartition(".")[0] == own]
    return (
        _among(leaf, siblings)
        or _stripped(leaf, siblings)
        or next((name for name in siblings if name.startswith(f"{own}.{leaf}_")), None)
        or _peer(leaf, known)
        or _among(leaf, settings, cutoff=0.8)
        or _stripped(leaf, settings)
    )


def nearest(name: str, known: list[str], *, cutoff: float = CUTOFF) -> str | None:
    """The known name that is spelled most alike."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(guess: str | None) -> str:
    """A sentence to add to an error; empty without a guess. An experiment is added with a plus."""
    if not guess:
        return ""
    return f" Did you mean {'+exp=<name>' if guess == 'exp' else guess}?"


def _peer(leaf: str, known: list[str]) -> str | None:
    found = SPELLINGS.get(leaf)
    return found if found in known else None


def _among(leaf: str, known: list[str], *, cutoff: float = CUTOFF) -> str | None:
    """The known key with this last name, this name in another framework, these initials, or nearly this last name."""
    leaves: dict[str, str] = {}
    for name in sorted(known, key=lambda name: name.count(".")):
        leaves.setdefault(name.rpartition(".")[2], name)
    by_initials = {"".join(word[0] for word in name.split("_")): full for name, full in leaves.items() if "_" in name}
    found = leaves.get(leaf) or _peer(leaf, known) or by_initials.get(leaf)
    if found:
        return found
    close = nearest(leaf, list(leaves), cutoff=cutoff)
    return leaves[close] if close else None


def _stripped(leaf: str, known: list[str]) -> str | None:
    """As _among(), for names such as lora_alpha, model_revision, adam_eps, which start with their concept."""
    rest = re.sub(r"^(lora|wandb|model|adam|data|batch|train|eval|optim|optimizer)_", "", leaf)
    return _among(rest, known, cutoff=0.8) if rest != leaf else None
