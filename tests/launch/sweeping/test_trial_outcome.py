"""How a trial ended, from what its run has left."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.launch.sweeping.trial_outcome import TrialOutcome, curve, outcome_of

GOOD = {"status": "finished", "eval": {"loss": 0.5, "exact_match": 1.0}, "train_loss": 0.4, "tokens_per_second": 100.0}


def left(folder: Path, summary: dict[str, Any] | None = None, failure: str | None = None, log: str = "") -> Path:
    """Writes a run folder; returns the log beside it."""
    if summary is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
    if failure is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failure.json").write_text(json.dumps({"cause": failure}))
    path = folder.with_suffix(".log")
    path.write_text(log)
    return path


def test_a_finished_run_has_its_values(tmp_path: Path) -> None:
    log = left(tmp_path / "run", GOOD)
    outcome = outcome_of(tmp_path / "run", log, 0, ["eval/loss", "throughput/tokens_per_second"])
    assert (outcome.status, outcome.values) == ("finished", [0.5, 100.0])
    assert outcome.figures == {
        "eval/loss": 0.5,
        "eval/exact_match": 1.0,
        "train/loss": 0.4,
        "throughput/tokens_per_second": 100.0,
    }


@pytest.mark.parametrize("loss", [None, "NaN", float("nan"), float("inf"), True])
def test_a_loss_that_is_no_number_is_no_result(tmp_path: Path, loss: object) -> None:
    log = left(tmp_path / "run", GOOD | {"eval": {"loss": loss}})
    outcome = outcome_of(tmp_path / "run", log, 0, ["eval/loss"])
    assert (outcome.status, outcome.cause) == ("failed", "diverged: eval/loss is no finite number")


@pytest.mark.parametrize(
    ("code", "failure", "log", "cause"),
    [
        (1, "rank 1: out of memory in forward", "", "rank 1: out of memory in forward"),
        (2, None, "...\nConfigError: engine.stage=9 is unknown.\n  at: engine.stage\n", "engine.stage=9 is unknown"),
        (1, None, "Traceback\n  File x\nRuntimeError: size mismatch\n", "RuntimeError: size mismatch"),
        (
            137,
            None,
            "supervise: the training died: its launcher was ended by SIGKILL\nsupervise: giving up\n",
            "the training died: its launcher was ended by SIGKILL",
        ),
        (3, None, "nothing to see\n", "exit code 3"),
        (1, None, "OSError: cannot reach https://me:hunter2hunter2@host/\n", "https://***@host/"),
    ],
)
def test_a_failed_run_has_its_cause_in_one_line(
    tmp_path: Path, code: int, failure: str | None, log: str, cause: str
) -> None:
    outcome = outcome_of(tmp_path / "run", left(tmp_path / "run", None, failure, log), code, ["eval/loss"])
    assert outcome.status == "failed"
    assert cause in (outcome.cause or "")
    assert "\n" not in (outcome.cause or "")


def test_a_stopped_run_is_neither(tmp_path: Path) -> None:
    assert outcome_of(tmp_path / "run", tmp_path / "log", 75, ["eval/loss"]) == TrialOutcome("stopped")


@pytest.mark.parametrize(("then", "status"), [("stopped", "stopped"), ("failed", "failed")])
def test_a_job_says_itself_how_it_ended(tmp_path: Path, then: str, status: str) -> None:
    (tmp_path / "job").mkdir()
    rows = [{"event": "started"}, {"event": "ended", "cause": "rank 1 died", "then": then}]
    (tmp_path / "job/events.jsonl").write_text("".join(json.dumps({"time": 1.0, **row}) + "\n" for row in rows))
    outcome = outcome_of(tmp_path, tmp_path / "log", None, ["eval/loss"])
    assert (outcome.status, outcome.cause) == (status, "rank 1 died" if status == "failed" else None)


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([], "stopped"),
        ([("started", None), ("ended", "requeued")], "stopped"),
        ([("started", None), ("ended", "failed")], "failed"),
    ],
)
def test_a_job_that_is_cancelled_while_it_waits_was_stopped(
    tmp_path: Path, rows: list[tuple[str, str | None]], status: str
) -> None:
    (tmp_path / "job").mkdir()
    lines = [json.dumps({"time": 1.0, "event": event, "then": then, "cause": "rank 1 died"}) for event, then in rows]
    (tmp_path / "job/events.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert outcome_of(tmp_path, tmp_path / "log", None, ["eval/loss"]).status == "failed"
    (tmp_path / "job/stop").touch()
    assert outcome_of(tmp_path, tmp_path / "log", None, ["eval/loss"]).status == status


def test_an_old_result_is_none_of_an_attempt_that_failed(tmp_path: Path) -> None:
    log = left(tmp_path / "run", GOOD)
    assert outcome_of(tmp_path / "run", log, 1, ["eval/loss"]).status == "failed"


def test_a_curve_leaves_out_what_is_no_number_and_a_torn_line(tmp_path: Path) -> None:
    rows = (
        '{"step": 1, "eval/loss": 2.0}\n{"step": 2, "eval/loss": null}\n{"step": 3, "eval/loss": 1.0}\n{"step": 4, "ev'
    )
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert curve(tmp_path, "eval/loss") == [(1, 2.0), (3, 1.0)]
