"""The settings named when memory runs out are those that this config does not use yet."""

import pytest
import torch

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Config
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.watch.out_of_memory import NUM_REMEDIES, explained, remedies

TWO = World(rank=1, world_size=2, local_rank=1, local_world_size=2)


def composed(*overrides: str) -> Config:
    return compose_config(["+exp=debug", *overrides]).config


def named(config: Config, world: World = TWO, phase: Phase = Phase.forward, on_gpu: bool = True) -> list[str]:
    return [text.split(" ")[0] for text in remedies(config, world, phase=phase, on_gpu=on_gpu)][:NUM_REMEDIES]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["batch.micro_batch_size=2"],
            ["batch.micro_batch_size=1", "memory=recompute", "engine=zero3"],
        ),
        (["engine=ddp"], ["memory=recompute", "engine=zero1", "adapter=lora"]),
        (
            ["memory=recompute"],
            ["engine=zero3", "engine.offload_optimizer=cpu", "adapter=lora"],
        ),
        (
            ["memory=recompute", "kernels=off", "adapter=lora"],
            ["kernels=auto", "engine=zero3", "engine.offload_optimizer=cpu"],
        ),
        (
            ["memory=recompute", "engine=zero3_offload", "adapter=lora"],
            ["engine.precision=bf16", "batch.sequence_length=256", "more"],
        ),
    ],
)
def test_what_is_in_use_already_is_not_advised(overrides: list[str], expected: list[str]) -> None:
    assert named(composed(*overrides)) == expected


def test_each_remedy_is_a_setting_that_composes() -> None:
    for overrides in (["batch.micro_batch_size=2"], ["engine=ddp"], ["kernels=off"], ["engine=zero3"]):
        for remedy in named(composed(*overrides)):
            if "=" in remedy:
                assert composed(*overrides, remedy)


def test_an_evaluation_is_helped_by_its_own_batch_size() -> None:
    assert named(composed(), phase=Phase.generating)[0] == named(composed(), phase=Phase.evaluating)[0]
    assert named(composed(), phase=Phase.evaluating)[0] == "evaluate.batch_size=4"


def test_one_rank_is_not_told_to_shard() -> None:
    found = remedies(composed(), World(), phase=Phase.forward, on_gpu=True)
    assert not any(remedy.startswith("engine=zero") for remedy in found)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_host_memory_is_one_message(error: Exception) -> None:
    found = explained(error, composed(), TWO)
    assert found is not None
    assert found.what.startswith("rank 1 of 2 ran out of host memory at step ")
    assert "GiB" in found.what
    assert str(found.do).count("; or ") == NUM_REMEDIES - 1


def test_torchs_own_error_for_host_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert explained(caught.value, composed(), TWO) is not None


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError(), OSError(28, "No space left on device")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert explained(error, composed(), TWO) is None


@pytest.mark.gpu
def test_a_lack_of_gpu_memory_is_one_message() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**45, device="cuda")
    found = explained(caught.value, composed(), TWO)
    assert found is not None
    assert "ran out of GPU memory" in found.what
