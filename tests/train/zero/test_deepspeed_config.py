from collections.abc import Callable
from typing import Any

import pytest

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Config
from tunesmith.train.errors import ConfigError
from tunesmith.train.zero.deepspeed_config import check, deepspeed_config, reduce_bucket_size


def config_of(*overrides: str) -> Config:
    run = ["model=tiny", "data.train=none.jsonl", "optimizer.learning_rate=1e-3", "schedule.epochs=null"]
    sizes = ["batch.global_batch_size=8", "batch.micro_batch_size=2", "schedule.max_steps=1"]
    return compose_config([*run, *sizes, *overrides]).config


@pytest.mark.parametrize(
    ("raw", "owner"),
    [
        ("train_batch_size=16", "batch.global_batch_size"),
        ("train_micro_batch_size_per_gpu=4", "batch.micro_batch_size"),
        ("gradient_accumulation_steps=1", "batch.global_batch_size and batch.micro_batch_size"),
        ("gradient_clipping=0.5", "optimizer.max_grad_norm"),
        ("optimizer.type=AdamW", "optimizer.*"),
        ("optimizer={type: Lion}", "optimizer.*"),
        ("scheduler.type=WarmupLR", "schedule.*"),
        ("bf16.enabled=false", "engine.precision"),
        ("fp16.enabled=true", "engine.precision"),
        ("amp.enabled=true", "engine.precision"),
        ("torch_autocast.enabled=true", "engine.precision"),
        ("zero_optimization.stage=3", "engine.stage"),
        ("zero_optimization.offload_optimizer.device=cpu", "engine.offload_optimizer"),
        ("zero_optimization={offload_param: {device: cpu}}", "engine.offload_weights"),
        ("zero_optimization.compute_grad_norm=false", "never applies a gradient that is not finite"),
        ("bf16.check_grad_overflow=false", "never applies a gradient that is not finite"),
        ("bf16.bf16_master_weights_and_grads=true", "keeps master weights and moments in fp32"),
        ("bf16.bf16_optimizer_states=true", "keeps master weights and moments in fp32"),
        ("fp16.fp16_master_weights_and_grads=true", "keeps master weights and moments in fp32"),
        ("managed_gradient_accumulation=false", "Tunesmith's loop"),
        ("prescale_gradients=true", "divides by the tokens that count"),
        ("gradient_predivide_factor=2.0", "divides by the tokens that count"),
        ("gradient_allreduce_op=sum", "divides by the tokens that count"),
    ],
)
def test_a_raw_key_that_contradicts_a_setting_is_refused_by_name(raw: str, owner: str) -> None:
    config = config_of("engine=zero2", f"engine.deepspeed.{raw}")
    with pytest.raises(ConfigError, match="contradicts") as caught:
        check(config, world_size=2)
    key = raw.split("=")[0].split(".")[0]
    assert owner in caught.value.what
    assert caught.value.key is not None
    assert caught.value.key.startswith(f"engine.deepspeed.{key}")
    assert caught.value.do is not None
    assert "drop the raw key" in caught.value.do


def test_a_contradiction_says_what_our_setting_makes_of_it() -> None:
    config = config_of("engine=zero2", "engine.deepspeed.gradient_clipping=0.5", "optimizer.max_grad_norm=2.0")
    with pytest.raises(ConfigError) as caught:
        check(config, world_size=2)
    assert str(caught.value) == (
        "ConfigError: engine.deepspeed.gradient_clipping=0.5 contradicts optimizer.max_grad_norm, which makes it 2.0.\n"
        "  at: engine.deepspeed.gradient_clipping\n"
        "  do: drop the raw key and set optimizer.max_grad_norm."
    )


@pytest.mark.parametrize("raw", ["zero_optimization=3", "bf16=true", "fp16=null"])
def test_a_raw_value_in_the_place_of_a_section_is_refused(raw: str) -> None:
    with pytest.raises(ConfigError, match="a section with settings of its own"):
        check(config_of(f"engine.deepspeed.{raw}"), world_size=1)


def test_a_misspelt_raw_key_is_refused_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean zero_optimization"):
        check(config_of("engine.deepspeed.zero_optimisation.stage=2"), world_size=1)


def test_raw_keys_that_agree_or_that_we_do_not_set_are_passed_on() -> None:
    config = config_of(
        "engine=zero3",
        "engine.deepspeed.zero_optimization.stage=3",
        "engine.deepspeed.train_batch_size=8",
        "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
        "engine.deepspeed.wall_clock_breakdown=true",
    )
    found = deepspeed_config(config, world_size=2)
    assert found["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert found["zero_optimization"]["overlap_comm"] is True  # ours stays beside the raw key
    assert found["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(1, 1, 8), (1, 4, 2), (2, 1, 4), (2, 4, 1), (4, 2, 1)]
)
def test_accumulation_follows_from_the_global_batch(world_size: int, micro: int, accumulation: int) -> None:
    found = deepspeed_config(config_of(f"batch.micro_batch_size={micro}"), world_size)
    assert found["gradient_accumulation_steps"] == accumulation
    assert found["train_batch_size"] == 8


@pytest.mark.parametrize(("world_size", "micro"), [(3, 1), (2, 3), (1, 16)])
def test_a_global_batch_that_does_not_divide_is_refused(world_size: int, micro: int) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=8 does not divide"):
        check(config_of(f"batch.micro_batch_size={micro}"), world_size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_and_stage_reach_deepspeed(stage: int, precision: str) -> None:
    found = deepspeed_config(config_of(f"engine.stage={stage}", f"engine.precision={precision}"), world_size=2)
    assert found["zero_optimization"]["stage"] == (1 if precision != "fp32" and stage == 0 else stage)
    assert {name: found[name]["enabled"] for name in ("bf16", "fp16")} == {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }


def test_no_clipping_is_zero_to_deepspeed() -> None:
    assert deepspeed_config(config_of("optimizer.max_grad_norm=null"), world_size=1)["gradient_clipping"] == 0.0


def test_offload_reaches_deepspeed() -> None:
    nvme = ["engine=zero3_nvme", "engine.nvme_path=/local/nvme"]
    zero = deepspeed_config(config_of(*nvme), world_size=1)["zero_optimization"]
    assert zero["offload_param"]["device"] == "nvme"
    assert zero["offload_optimizer"]["nvme_path"] == "/local/nvme"
    zero = deepspeed_config(config_of("engine=zero2_offload"), world_size=1)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in zero


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ([1_000, 500], 1_500),  # no more than there is
        ([65_536] * 640, 5_242_880),  # LoRA of an 8B model: an eighth
        ([65_536] * 64, 4_000_000),  # latency would cost more than the bytes do
        ([10_000_000] * 300, 50_000_000),
        ([525_336_576, *[58_720_256] * 96], 58_720_256),  # an 8B model: embeddings pass every bucket by
        ([262_668_288, *[16_777_216] * 48], 262_668_288),  # tied embeddings of a 1B model
        ([600_000_000, 1_000], 50_000_000),  # what is larger than any bucket does not count
    ],
)
def test_a_gradient_bucket_fits_what_is_trained(trained: list[int], expected: int) -> None:
    assert reduce_bucket_size(trained) == expected
    zero = deepspeed_config(config_of("engine=zero2"), 2, trained)["zero_optimization"]
    assert zero["reduce_bucket_size"] == expected


def test_a_raw_bucket_size_outweighs_ours_and_none_is_set_where_nothing_is_split() -> None:
    raw = config_of("engine=zero3", "engine.deepspeed.zero_optimization.reduce_bucket_size=7")
    assert deepspeed_config(raw, 2, [1_000])["zero_optimization"]["reduce_bucket_size"] == 7
    plain = config_of("engine=ddp", "engine.precision=fp32")
    assert "reduce_bucket_size" not in deepspeed_config(plain, 2, [1_000])["zero_optimization"]


def bucket_of(rank: Any, overrides: list[str]) -> tuple[int, int]:
    """On a rank: elements of DeepSpeed's bucket, and of all trained parameters."""
    with rank.ready(overrides) as (loop, _):
        engine = loop.session.engine
        return engine._engine.zero_reduce_bucket_size(), loop.session.size.trainable


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_holds_no_larger_bucket_than_there_are_gradients(
    stage: int, ranks: Callable[[int], Any], short_run: Callable[..., list[str]]
) -> None:
    for bucket, trained in ranks(2).run(bucket_of, overrides=short_run(stage, 1, "checkpoint.at_end=false")):
        assert bucket == trained
