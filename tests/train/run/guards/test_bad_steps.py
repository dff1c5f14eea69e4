"""A step that is not finite names the ranks whose losses were not, and the records that were in them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

OverridesOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]]) -> OverridesOf:
    """Two ranks, two micro batches of two packed sequences each."""
    return lambda stage, *more: short_run(stage, 5, "checkpoint.at_end=false", *more, records=200)


def spoiled_run(rank: Any, overrides: list[str], run_dir: str, faults: str, poison_gradients: bool = False) -> Any:
    """On every rank: a run with planned faults, and each step's records, read from the data by their tokens."""
    import torch

    from tunesmith.train.errors import TrainingError
    from tunesmith.train.ranks.progress import progress

    had: list[list[list[str]]] = []  # of this rank: step, micro batch, records
    error = ""
    with rank.ready(overrides, run_dir) as (loop, recorder):
        store, places = loop.run.data.train, loop.run.data.train.places()
        tokens = [store.record(index)[0].tolist() for index in range(store.num_records)]
        for step in range(5):
            had.append([records_in(batch, tokens, places) for batch in loop.run.feed.batches(step)])
        if poison_gradients:
            weight = next(p for p in loop.session.engine.module.parameters() if p.requires_grad)
            weight.register_hook(lambda gradient: gradient * torch.nan if progress.step == 2 else gradient)
        with rank.faults(loop, faults):
            try:
                loop.train()
            except TrainingError as found:
                error = str(found)
    return {"had": had, "warnings": recorder.warnings, "error": error, "steps": [s.applied for s in recorder.steps]}


def records_in(batch: Any, tokens: list[list[int]], places: list[str]) -> list[str]:
    """The places of the records whose tokens a micro batch holds, found by their tokens alone."""
    found = []
    for ids, positions in zip(batch.inputs["input_ids"].tolist(), batch.inputs["position_ids"].tolist(), strict=True):
        starts = [index for index, position in enumerate(positions) if position == 0] + [len(ids)]
        for start, end in itertools.pairwise(starts):
            same = [places[index] for index, own in enumerate(tokens) if own == ids[start:end]]
            found += same[:1]
    return found


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.row(20)
@pytest.mark.parametrize(
    ("kind", "stage"),
    covered(
        itertools.product(("nan", "inf"), range(4)),
        [("nan", 0), ("inf", 2), ("nan", 3)],
        [("inf", 0), ("nan", 2), ("inf", 3)],
    ),
)
def test_the_rank_and_the_records_of_a_loss_that_is_not_finite_are_named(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, stage: int, kind: str
) -> None:
    faults = f"{kind}:rank=1,step=2"  # in its first forward of that step
    found = ranks(2).run(spoiled_run, overrides=overrides_of(stage), run_dir=str(tmp_path), faults=faults)
    assert found[0]["steps"] == [True, True, False, True, True]
    (row,) = rows(tmp_path)
    assert (row["step"], row["reason"]) == (3, "not finite")
    (named,) = row["losses"]
    assert (named["rank"], named["micro_batch"]) == (1, 0)
    expected = found[1]["had"][2][0]
    assert len(expected) > 3
    assert sorted(named["records"]) == sorted(expected)
    (warning,) = found[0]["warnings"]
    assert f"rank 1 micro batch 0: {named['records'][0]}, " in warning
    assert f"and {len(expected) - 3} more (skipped_steps.jsonl)" in warning
    assert "\n" not in warning


def test_every_loss_is_named_when_the_whole_step_is_not_finite(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path
) -> None:
    faults = "nan:step=1,last_step=1"
    found = ranks(2).run(spoiled_run, overrides=overrides_of(1), run_dir=str(tmp_path), faults=faults)
    (row,) = rows(tmp_path)
    assert [(named["rank"], named["micro_batch"]) for named in row["losses"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for named in row["losses"]:
        expected = found[named["rank"]]["had"][1][named["micro_batch"]]
        assert sorted(named["records"]) == sorted(expected)
    assert "; and 1 more losses (skipped_steps.jsonl)" in found[0]["warnings"][0]


def test_gradients_alone_are_said_to_be_it_with_all_records_of_the_step(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path
) -> None:
    found = ranks(2).run(
        spoiled_run, overrides=overrides_of(0), run_dir=str(tmp_path), faults="", poison_gradients=True
    )
    (row,) = rows(tmp_path)
    assert row["gradients_only"] is True
    assert "losses" not in row
    expected = [record for rank in found for micro_batch in rank["had"][2] for record in micro_batch]
    assert sorted(row["records"]) == sorted(expected)
    assert "every loss was finite, only the gradients were not" in found[0]["warnings"][0]


@pytest.mark.row(20)
def test_the_error_at_the_bound_names_the_file(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path
) -> None:
    faults = "nan:rank=0,step=1,last_step=4"
    overrides = overrides_of(2, "optimizer.max_skipped_steps=2")
    for found in ranks(2).run(spoiled_run, overrides=overrides, run_dir=str(tmp_path), faults=faults):
        assert found["error"].startswith("TrainingError: 2 steps in a row had a loss or gradient that is not finite.")
        assert f"{tmp_path / 'skipped_steps.jsonl'} lists" in found["error"]
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]


def good_steps(rank: Any, overrides: list[str]) -> int:
    """On every rank: the collectives of a good step that this project calls itself."""
    import torch.distributed as dist

    with rank.ready(overrides) as (loop, _):
        loop.step()
        called = []
        gather = dist.all_gather
        dist.all_gather = lambda *a, **k: called.append("gather") or gather(*a, **k)
        try:
            loop.step()
        finally:
            dist.all_gather = gather
    return len(called)


def test_a_good_step_asks_nobody(ranks: Callable[[int], Any], overrides_of: OverridesOf) -> None:
    assert ranks(2).run(good_steps, overrides=overrides_of(0)) == [0, 0]
