"""A run that was stopped goes on with bitwise the losses of one that was left alone (invariant 5)."""

import itertools
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered
from train_ranks import start_ranks
from zygote import Zygote

NUM_STEPS = 11
SLOWLY = {"TUNESMITH_FAULTS": "slow:phase=forward,step=0,last_step=100,seconds=0.05"}  # there is time to kill it
ADAPTERS = {"none": ["adapter=none"], "lora": ["adapter=lora", "adapter.dropout=0.1"]}
OverridesOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]], make_model: Callable[..., Path]) -> OverridesOf:
    """Overrides of a run with dropout and two forwards a step on each of two ranks, saved every three steps."""
    own = ["schedule=cosine", "optimizer.learning_rate=3e-3", "checkpoint.every_steps=3"]
    model = make_model(attention_dropout=0.1)

    def overrides(stage: int, adapter: str, *more: str) -> list[str]:
        return short_run(stage, NUM_STEPS, *own, *ADAPTERS[adapter], *more, model=model, splits_all=True)

    return overrides


@pytest.mark.row(17)
@pytest.mark.parametrize(
    ("stage", "adapter"),
    covered(itertools.product(range(4), ADAPTERS), [(2, "lora")], [(0, "none"), (1, "lora"), (2, "none"), (3, "lora")]),
)
def test_losses_after_two_resumes_are_bitwise_those_of_one_run(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, stage: int, adapter: str
) -> None:
    overrides = overrides_of(stage, adapter)
    alone = ranks(2).train_in_pieces(overrides=overrides, run_dir=str(tmp_path / "alone"), stop_after=[])
    taken_up = ranks(2).train_in_pieces(overrides=overrides, run_dir=str(tmp_path / "taken-up"), stop_after=[5, 4])
    assert taken_up[0]["started_at"] == [0, 3, 6]
    assert len(alone[0]["losses"]) == NUM_STEPS
    assert taken_up[0]["losses"] == alone[0]["losses"]
    assert taken_up[1]["losses"] == alone[1]["losses"]


def dropped(rank: Any, overrides: list[str], run_dir: str) -> dict[str, float]:
    """On every rank: losses of one micro batch, the same on all of them, with dropout and without."""
    import torch

    with rank.ready(overrides, run_dir) as (loop, _), torch.no_grad():
        batch = loop.run.data.train.batch([0, 1], pad_token_id=0)
        first, second = (float(loop.session.engine.scorer.nll(batch).loss) for _ in range(2))
        loop.session.engine.eval()
        return {"first": first, "second": second, "without": float(loop.session.engine.scorer.nll(batch).loss)}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_rank_and_each_forward_drops_others(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, adapter: str
) -> None:
    on_ranks = ranks(2).run(dropped, overrides=overrides_of(2, adapter), run_dir=str(tmp_path / "run"))
    assert on_ranks[0]["without"] == on_ranks[1]["without"]
    assert len({found[name] for found in on_ranks for name in ("first", "second")}) == 4


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The training rows of metrics.jsonl, without a last one that was cut short."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [row for row in map(json.loads, lines) if "train/loss" in row]


@pytest.mark.row(17)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "adapter"),
    [
        pytest.param(2, "lora", marks=pytest.mark.torture),
        *(
            pytest.param(stage, adapter, marks=pytest.mark.slow)
            for stage in range(4)
            for adapter in ADAPTERS
            if (stage, adapter) != (2, "lora")
        ),
    ],
)
def test_the_same_command_goes_on_bitwise_after_being_killed_twice(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, zygote: Zygote, tmp_path: Path, stage: int, adapter: str
) -> None:
    run_dir = tmp_path / "run"
    overrides = overrides_of(stage, adapter, "cluster.device=cpu")
    alone = ranks(2).train_in_pieces(overrides=overrides, run_dir=str(tmp_path / "alone"), stop_after=[])[0]["losses"]
    lots = random.Random(stage)
    for step in (lots.randint(4, 6), lots.randint(8, NUM_STEPS - 2)):
        job = start_ranks(zygote, [*overrides, f"output_dir={run_dir}"], cwd=tmp_path, env=SLOWLY)
        job.wait_until(lambda step=step: bool(found := rows(run_dir)) and found[-1]["step"] >= step)
        time.sleep(lots.uniform(0, 0.2))  # wherever it is then
        job.kill_all()
        assert set(job.codes.values()) == {-signal.SIGKILL}
    job = start_ranks(zygote, [*overrides, f"output_dir={run_dir}"], cwd=tmp_path).wait()
    assert set(job.codes.values()) == {0}, job.said[-3000:]
    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(1, NUM_STEPS + 1))
    assert [row["train/loss"] for row in found] == alone
