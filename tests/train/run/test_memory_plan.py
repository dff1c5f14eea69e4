"""memory=auto: the fastest way that fits, said in a line; what it counts with is what DeepSpeed holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Config
from tunesmith.train.model.load import check_model
from tunesmith.train.model.packing import settle
from tunesmith.train.ranks.distributed import World
from tunesmith.train.run.memory_plan import settle_memory, states_bytes
from tunesmith.train.zero.deepspeed_config import reduce_bucket_size

CPU = torch.device("cpu")
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """A folder with Llama 3.1 8B's config, and no weights."""
    AutoConfig.for_model("llama", **LLAMA_8B).save_pretrained(tmp_path)
    return tmp_path


def planned(folder: Path, *overrides: str, world_size: int = 1) -> tuple[Config, list[str]]:
    """Of Llama 3.1 8B with 2 x 4,096 tokens a forward, unless told otherwise."""
    command = ["+exp=support_bot_lora_8b", "model=hub", f"model.name_or_path={folder}", "data.train=x.jsonl"]
    config, notes = compose_config([*command, *overrides]).config, list[str]()
    hf_config = check_model(config)
    settle(config, hf_config, CPU, notes.append)
    settle_memory(config, hf_config, World(world_size=world_size), CPU, notes.append)
    return config, notes


def outcome(folder: Path, *overrides: str, world_size: int = 1) -> tuple[int, float]:
    config, _ = planned(folder, *overrides, world_size=world_size)
    assert config.memory.recompute is not None
    return config.batch.micro_batch_size, config.memory.recompute


def test_a_141_gb_card_recomputes_nothing_and_smaller_ones_what_they_must(llama_8b: Path) -> None:
    assert outcome(llama_8b, "memory.limit_gib=139") == (2, 0.0)
    shares = [outcome(llama_8b, "batch.micro_batch_size=1", f"memory.limit_gib={gib}")[1] for gib in (60, 30)]
    assert shares[0] == 0 < shares[1]


def test_forwards_become_smaller_before_anything_is_computed_again(llama_8b: Path) -> None:
    sequences, share = outcome(llama_8b, "batch.micro_batch_size=8", "memory.limit_gib=80")
    assert sequences in (1, 2, 4)
    assert share == 0.0


def test_what_is_foreseen_is_said_with_its_parts(llama_8b: Path) -> None:
    _, notes = planned(llama_8b, "memory.limit_gib=139")
    (note,) = notes
    assert note.startswith("memory: ")
    assert "of 139.0 GiB a GPU foreseen (weights, gradients, optimizer 1" in note
    assert note.endswith("2 sequences a forward, 0 of 32 blocks recompute")


def test_what_does_not_fit_at_all_is_tried_with_the_least_and_said(llama_8b: Path) -> None:
    config, (note,) = planned(llama_8b, "memory.limit_gib=16")
    assert (config.batch.micro_batch_size, config.memory.recompute) == (1, 1.0)
    assert note.endswith("That is likely too much: use a higher ZeRO stage, offload, or shorter sequences")


def test_what_a_person_sets_stays(llama_8b: Path) -> None:
    assert outcome(llama_8b, "memory=recompute", "memory.limit_gib=139") == (2, 1.0)
    assert outcome(llama_8b, "memory=keep", "memory.limit_gib=30") == (2, 0.0)


def test_without_a_gpu_or_a_limit_nothing_is_recomputed(llama_8b: Path) -> None:
    config, notes = planned(llama_8b)
    assert (config.batch.micro_batch_size, config.memory.recompute, notes) == (2, 0.0, [])


@pytest.mark.parametrize(
    ("overrides", "world_size", "bytes_a_parameter"),
    [
        (["engine=ddp", "engine.precision=fp32"], 1, 4 + 4 + 8),
        (["engine=zero1"], 4, 2 + 4 + 12 / 4),  # gradients are added up in fp32 where there are several forwards
        (["engine=zero2"], 4, 2 + 4 / 4 + 12 / 4),
        (["engine=zero3"], 4, 2 / 4 + 4 / 4 + 12 / 4),
        (["engine=zero2_offload"], 4, 2 + 4 / 4),
        (["engine=zero3_offload"], 4, 4 / 4),
    ],
)
def test_states_are_counted_by_stage_and_offload(
    overrides: list[str], world_size: int, bytes_a_parameter: float
) -> None:
    batch = ["batch.global_batch_size=16", "batch.micro_batch_size=1", "engine.precision=bf16"]
    config = compose_config(["+exp=debug", *batch, *overrides]).config
    trained, parameters = [400_000_000] * 25, 10_000_000_000
    found = states_bytes(config, parameters, trained, world_size, num_sequences=1)
    buffers = 0 if overrides[0] == "engine=ddp" else (2 if world_size > 1 else 1) * 4 * reduce_bucket_size(trained)
    gathered = 2 * 1_000_000_000 if config.engine.stage == 3 else 0
    assert found == pytest.approx(bytes_a_parameter * parameters + buffers + gathered)


def test_smaller_forwards_are_summed_in_fp32() -> None:
    """One forward a step needs no sum; a plan of smaller ones does."""
    batch = ["batch.global_batch_size=4", "batch.micro_batch_size=4"]
    config = compose_config(["+exp=debug", "engine=zero2", "engine.precision=bf16", *batch]).config
    at_once, in_four = (states_bytes(config, 100, [100], 1, num_sequences=number) for number in (4, 1))
    assert in_four - at_once == 2 * 100
