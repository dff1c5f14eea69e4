"""A bit that flips in one rank's weights is found at the next check, and the rank is named where that can be told."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrices import covered

from tunesmith.train.run.guards.replicas import _odd_ones, bit_sum

OverridesOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]]) -> OverridesOf:
    batch = ["batch.global_batch_size=12", "batch.micro_batch_size=1"]
    own = [*batch, "engine.precision=bf16", "checkpoint.at_end=false", "cluster.check_replicas_every=2"]
    return lambda stage, adapter, *more: short_run(stage, 8, *own, f"adapter={adapter}", *more)


def flipped_run(rank: Any, overrides: list[str], fault: str) -> dict[str, Any]:
    """On every rank: a run in which a bit flips, and how it ended."""
    from tunesmith.train.errors import TrainingError

    error = ""
    with rank.ready(overrides) as (loop, recorder):
        with rank.faults(loop, fault):
            try:
                loop.train()
            except TrainingError as found:
                error = str(found)
        return {"error": error, "step": loop.session.state.step, "notes": recorder.notes, "losses": recorder.losses}


@pytest.mark.row(27)
@pytest.mark.parametrize(
    ("stage", "precision"),
    covered(itertools.product(range(3), ("fp32", "bf16")), [(0, "bf16"), (2, "fp32")], [(1, "fp32"), (1, "bf16")]),
)
def test_two_ranks_that_differ_are_both_named(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, stage: int, precision: str
) -> None:
    overrides = overrides_of(stage, "none", f"engine.precision={precision}")
    found = ranks(2).run(flipped_run, overrides=overrides, fault="flip:rank=1,step=3")
    for on_rank in found:  # flipped in step 4, which is checked before its update
        assert on_rank["error"].startswith(
            "TrainingError: the ranks no longer hold the same weights: model.embed_tokens"
        )
        assert "differ between rank 0 (" in on_rank["error"]
        assert "and rank 1 (" in on_rank["error"]
        assert "at: step 4, cluster.check_replicas_every" in on_rank["error"]
        assert on_rank["step"] == 3


@pytest.mark.row(27)
@pytest.mark.parametrize("stage", covered([0, 2, 3], [3], [0, 2]))
def test_a_frozen_weight_names_its_rank_also_where_it_is_split(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, stage: int
) -> None:
    overrides = overrides_of(stage, "lora", "engine.precision=bf16")
    fault = "flip:rank=1,step=4"  # in step 5, found at the check of step 6
    for found in ranks(2).run(flipped_run, overrides=overrides, fault=fault):
        assert found["error"].startswith("TrainingError: weights on rank 1 (")
        assert "have changed in memory: base_model.model.model.embed_tokens.weight." in found["error"]
        assert "rank 0" not in found["error"]
        assert "at: step 6" in found["error"]


def test_one_rank_knows_its_frozen_weights(ranks: Callable[[int], Any], overrides_of: OverridesOf) -> None:
    (found,) = ranks(1).run(flipped_run, overrides=overrides_of(1, "lora"), fault="flip:rank=0,step=1")
    assert found["error"].startswith("TrainingError: weights on rank 0 (")


@pytest.mark.parametrize(
    ("stage", "adapter"),
    covered([(0, "none"), (1, "lora"), (2, "none"), (3, "lora"), (3, "none")], [], [(2, "none"), (3, "lora")]),
)
def test_a_sound_run_is_left_alone_and_keeps_its_losses(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, stage: int, adapter: str
) -> None:
    overrides = overrides_of(stage, adapter, "cluster.check_replicas_every=1")
    (found, _) = ranks(2).run(flipped_run, overrides=overrides, fault="")
    assert (found["error"], found["step"]) == ("", 8)
    (without, _) = ranks(2).run(flipped_run, overrides=[*overrides, "cluster.check_replicas_every=null"], fault="")
    assert found["losses"] == without["losses"]


@pytest.mark.slow
@pytest.mark.torture
def test_zero_3_says_what_it_cannot_check(ranks: Callable[[int], Any], overrides_of: OverridesOf) -> None:
    nothing_stays = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    (found, _) = ranks(2).run(flipped_run, overrides=overrides_of(3, "none", nothing_stays), fault="")
    (note,) = found["notes"]
    assert note.startswith("cluster.check_replicas_every: none of ")


@pytest.mark.parametrize(
    ("rows", "expected", "surely"),
    [
        ([[1, 5], [1, 5], [1, 5]], {}, True),
        ([[1, 5], [2, 5], [1, 5]], {1: ["a"]}, True),
        ([[1, 5], [1, 5], [1, 6], [2, 6]], {0: ["b"], 1: ["b"], 2: ["b"], 3: ["a", "b"]}, False),
        ([[1, 5], [1, 6]], {0: ["b"], 1: ["b"]}, False),
        ([[1, 5], [1, 6], [1, 7]], {0: ["b"], 1: ["b"], 2: ["b"]}, False),
    ],
)
def test_the_odd_ones_are_those_outside_the_majority(
    rows: list[list[int]], expected: dict[int, list[str]], surely: bool
) -> None:
    assert _odd_ones(rows, ["a", "b"]) == (expected, surely)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_any_flipped_bit_changes_the_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.train.run.guards.replicas.CHUNK", 7)  # several chunks, the last one not full
    tensor = (torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    whole = int(bit_sum(tensor))
    raw = tensor.view(torch.uint8).view(-1)
    sums = set()
    for bit in range(raw.numel() * 8):
        raw[bit // 8] ^= 1 << bit % 8
        sums.add(int(bit_sum(tensor)) == whole)
        raw[bit // 8] ^= 1 << bit % 8
    assert sums == {False}
    assert int(bit_sum(tensor)) == whole
    assert int(bit_sum(tensor.T.contiguous())) != whole
