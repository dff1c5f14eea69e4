import pytest

from tunesmith.train.config.suggest import PEERS, did_you_mean, suggest_key
from tunesmith.train.config.tree import schema_keys

KNOWN = [*schema_keys(), "exp"]

SLIPS = {
    "optimizer.lr": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "schedule.lr": "optimizer.learning_rate",
    "optimizr.lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "optimizer.learning_rat": "optimizer.learning_rate",
    "optimizer.wd": "optimizer.weight_decay",
    "wd": "optimizer.weight_decay",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "batch.mbs": "batch.micro_batch_size",
    "batch_size": "batch.global_batch_size",
    "batch.batch_size": "batch.global_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size",
    "gloabl_batch_size": "batch.global_batch_size",
    "max_seq_length": "batch.sequence_length",
    "data.max_length": "batch.sequence_length",
    "num_train_epochs": "schedule.epochs",
    "training.epochs": "schedule.epochs",
    "max_steps": "schedule.max_steps",
    "warmup_ratio": "schedule.warmup_fraction",
    "lora_r": "adapter.r",
    "model.lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_target_modules": "adapter.target_modules",
    "adapter.rank": "adapter.r",
    "bf16": "engine.precision",
    "engine.bf16": "engine.precision",
    "model.dtype": "engine.precision",
    "zero_stage": "engine.stage",
    "model_name_or_path": "model.name_or_path",
    "model.name": "model.name_or_path",
    "dataset": "data.train",
    "data.path": "data.train",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "evaluate.every_steps",
    "logging_steps": "track.every_steps",
    "run_name": "name",
    "output_dri": "output_dir",
    "ouput_dir": "output_dir",
    "out_dir": "output_dir",
    "output_directory": "output_dir",
    "seeed": "seed",
    "optimiser": "optimizer",
    "engin": "engine",
    "experiment": "exp",
}


@pytest.mark.parametrize(("typed", "meant"), SLIPS.items())
def test_a_slip_is_answered_with_the_key_that_was_meant(typed: str, meant: str) -> None:
    assert suggest_key(typed, KNOWN) == meant


@pytest.mark.parametrize("typed", ["_target_", "engine._target_", "foo", "model.foo", "xyz.abc"])
def test_no_wild_guess(typed: str) -> None:
    assert suggest_key(typed, KNOWN) is None


def test_what_others_call_it_leads_to_a_key_that_exists() -> None:
    assert set(PEERS) <= set(KNOWN)


def test_every_spelling_of_another_framework_is_understood_without_a_group() -> None:
    wrong = {
        spelling: suggest_key(spelling, KNOWN)
        for ours, spellings in PEERS.items()
        for spelling in spellings.split()
        if spelling not in KNOWN and suggest_key(spelling, KNOWN) != ours
    }
    assert wrong == {}


def test_an_experiment_is_suggested_as_it_is_written() -> None:
    assert did_you_mean("exp") == " Did you mean +exp=<name>?"
    assert did_you_mean("seed") == " Did you mean seed?"
    assert did_you_mean(None) == ""
