"""A loss spike: told, ended by, or rolled back from, and a run that was rolled back goes on like any other."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

TRAIN = Path(__file__).parents[4] / "launch/train.py"
NUM_STEPS = 44
EVERY_STEPS = 6
SPIKED = 38  # counted from 1: steps 36 to 38 are passed over, and the checkpoint of step 36 is not gone back to
FAULT = f"spike:step={SPIKED - 1}"  # its steps are counted from 0; last_step: in every forward of the step
EVERY_FORWARD = f"{FAULT},last_step={SPIKED - 1}"
OverridesOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]], make_model: Callable[..., Path]) -> OverridesOf:
    """Overrides of a run with dropout, long enough for spikes to be told from noise."""
    own = ["schedule=cosine", "optimizer.on_spike=rollback", f"checkpoint.every_steps={EVERY_STEPS}"]
    model = make_model(attention_dropout=0.1)

    def overrides(stage: int, adapter: str, *more: str) -> list[str]:
        adapters = ["adapter=lora", "adapter.dropout=0.1"] if adapter == "lora" else ["adapter=none"]
        return short_run(stage, NUM_STEPS, *own, *adapters, *more, model=model, splits_all=True)

    return overrides


def spiked_run(rank: Any, overrides: list[str], run_dir: str, faults: str, leave_after: int | None = None) -> Any:
    """On every rank: a run with planned faults as run.py trains it, left without a word after that many of its steps.

    Gives the loss of every step trained on (the last time it was), and what became of the run.
    """
    from worker import Recorder

    from tunesmith.train.config.compose import compose_config
    from tunesmith.train.errors import TrainingError
    from tunesmith.train.ranks.fault_plan import FaultPlan, parse
    from tunesmith.train.ranks.progress import progress
    from tunesmith.train.run.loop import Loop
    from tunesmith.train.run.setup import open_session
    from tunesmith.train.run.training import go_back, until_rollback

    class Left(Exception):
        pass

    trained: list[tuple[int, float]] = []

    class Leaver(Recorder):
        def step(self, state: Any, step: Any, **rest: float) -> None:
            super().step(state, step, **rest)
            trained.append((state.step, step.loss))
            if len(trained) == leave_after:
                raise Left

    recorder = Leaver()
    run = rank.made(compose_config(overrides).config, Path(run_dir), recorder)
    progress.plan = FaultPlan([parse(fault) for fault in faults.split(";") if fault], rank.world.rank)
    loop, error = Loop(run, open_session(run)), ""
    started_at = loop.session.state.step
    try:
        while back := until_rollback(loop):
            loop = go_back(loop, back)
    except Left:
        pass
    except TrainingError as found:
        error = str(found)
    finally:
        progress.plan = None
        loop.close()
    return {
        "started_at": started_at,
        "trained": trained,
        "losses": {str(step): loss for step, loss in trained},
        "learning_rates": recorder.learning_rates,
        "warnings": recorder.warnings,
        "error": error,
        "step": loop.session.state.step,
        "skipped": loop.session.state.skipped_steps,
        "checkpoints": loop.session.checkpoints.steps(),
    }


def skipped_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text(encoding="utf-8").splitlines()]


POINTS = [(0, "none"), (3, "lora"), (0, "lora"), (1, "none"), (1, "lora"), (2, "none"), (2, "lora"), (3, "none")]


@pytest.mark.row(20)
@pytest.mark.parametrize(("stage", "adapter"), covered(POINTS, [], POINTS[:1]))
def test_a_spike_is_rolled_back_from_and_a_kill_after_it_changes_nothing(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, stage: int, adapter: str
) -> None:
    overrides = overrides_of(stage, adapter)
    plain = ranks(2).run(spiked_run, overrides=overrides, run_dir=str(tmp_path / "plain"), faults="")[0]
    alone, other = ranks(2).run(spiked_run, overrides=overrides, run_dir=str(tmp_path / "alone"), faults=EVERY_FORWARD)
    assert alone["losses"] == other["losses"]
    assert plain["error"] == alone["error"] == ""
    assert not plain["warnings"]
    # Back from step 38 to 30: steps 31 to 35 are trained again, bitwise, 36 to 38 never, and 39 to 44 without them.
    steps = [step for step, _ in alone["trained"]]
    assert steps == [*range(1, SPIKED + 1), *range(31, 36), *range(39, NUM_STEPS + 1)]
    before = alone["trained"][:37]
    assert before == plain["trained"][:37]
    assert alone["trained"][SPIKED : SPIKED + 5] == before[30:35]
    assert alone["losses"]["39"] != plain["losses"]["39"]
    assert abs(alone["losses"][str(NUM_STEPS)] - plain["losses"][str(NUM_STEPS)]) < 0.5
    assert alone["learning_rates"][-6:] == plain["learning_rates"][-6:]  # a function of the step
    (warning,) = alone["warnings"]
    assert f"step {SPIKED}: loss " in warning
    assert "back to the checkpoint of step 30, passing over steps 36 to 38" in warning
    assert (alone["step"], alone["skipped"]) == (NUM_STEPS, 3)
    assert [row["step"] for row in skipped_rows(tmp_path / "alone")] == [36, 37, 38]
    # Killed after two steps from the checkpoint gone back to, and after ten, when a newer one knows of it all. The
    # fault does not come again: what was decided stands.
    for leave_after, started_at in ((SPIKED + 2, 30), (SPIKED + 10, 42)):
        run_dir = tmp_path / f"killed-{leave_after}"
        ranks(2).run(
            spiked_run, overrides=overrides, run_dir=str(run_dir), faults=EVERY_FORWARD, leave_after=leave_after
        )
        again = ranks(2).run(spiked_run, overrides=overrides, run_dir=str(run_dir), faults="")[0]
        assert again["started_at"] == started_at
        assert again["trained"] == [pair for pair in alone["trained"][SPIKED:] if pair[0] > started_at]
        assert [row["step"] for row in skipped_rows(run_dir)] == [36, 37, 38]


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.row(20)
def test_rollbacks_are_bounded(ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path) -> None:
    overrides = overrides_of(2, "none", "optimizer.max_rollbacks=1")
    faults = f"{EVERY_FORWARD};spike:step=40,last_step=40"
    for found in ranks(2).run(spiked_run, overrides=overrides, run_dir=str(tmp_path / "run"), faults=faults):
        assert found["error"].startswith("TrainingError: the loss leapt again after 1 rollbacks: loss ")
        assert "at: step 41" in found["error"]
        assert "optimizer.max_rollbacks sets the limit" in found["error"]


@pytest.mark.slow
def test_two_spikes_are_both_rolled_back_from(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path
) -> None:
    faults = f"{EVERY_FORWARD};spike:step=40,last_step=40"
    overrides = overrides_of(3, "none")
    found = ranks(2).run(spiked_run, overrides=overrides, run_dir=str(tmp_path / "run"), faults=faults)[0]
    # Step 36's checkpoint is of steps up to 35; the second window is 39 to 41.
    steps = [step for step, _ in found["trained"][SPIKED:]]
    assert steps == [*range(31, 36), *range(39, 42), *range(42, NUM_STEPS + 1)]
    assert found["skipped"] == 6
    assert [row["step"] for row in skipped_rows(tmp_path / "run")] == [36, 37, 38, 39, 40, 41]


@pytest.mark.row(20)
@pytest.mark.parametrize("what", covered(["warn", "stop", "no checkpoint"], ["stop"], ["warn", "no checkpoint"]))
def test_a_spike_is_told_where_it_is_not_rolled_back_from(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, what: str
) -> None:
    more = ["checkpoint.every_steps=40"] if what == "no checkpoint" else [f"optimizer.on_spike={what}"]
    found = ranks(2).run(
        spiked_run, overrides=overrides_of(0, "none", *more), run_dir=str(tmp_path / "run"), faults=EVERY_FORWARD
    )[0]
    if what == "stop":
        assert found["error"].startswith("TrainingError: the loss leapt: loss ")
        assert f"at: step {SPIKED}, optimizer.on_spike=stop" in found["error"]
        assert found["step"] == SPIKED
        return
    assert found["error"] == ""
    assert [step for step, _ in found["trained"]] == list(range(1, NUM_STEPS + 1))
    words = "(optimizer.on_spike=warn)" if what == "warn" else "there is no checkpoint before it to go back to"
    assert words in found["warnings"][0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_files_of_a_launched_run_that_was_rolled_back_have_each_step_once(
    overrides_of: OverridesOf, rank_environments: Callable[[int], list[dict[str, str]]], tmp_path: Path
) -> None:
    (environment,) = rank_environments(1)
    run_dir = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, str(TRAIN), *overrides_of(1, "lora"), "cluster.device=cpu", f"output_dir={run_dir}"],
        env=environment | {"TUNESMITH_FAULTS": EVERY_FORWARD},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("back to the checkpoint of step 30") == 1
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    assert [row["step"] for row in rows] == [*range(1, 36), *range(39, NUM_STEPS + 1)]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("finished", NUM_STEPS, 3)
