"""What came of a trial, read from what its run has left: summary.json, failure.json, metrics.jsonl, its log."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.launch.cluster.job_folder import JobFolder
from tunesmith.train.errors import EXIT_MISTAKE, EXIT_STOPPED
from tunesmith.train.files.rows import read_rows
from tunesmith.train.files.run_folder import SUMMARY, is_finished
from tunesmith.train.redact import redact_text

LOG_TAIL_BYTES = 20_000
FIGURES = {  # of summary.json
    "train/loss": "train_loss",
    "throughput/tokens_per_second": "tokens_per_second",
    "throughput/mfu": "mfu",
    "memory/peak_memory_gib": "peak_memory_gib",
    "time/train_seconds": "seconds",
}


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended."""

    status: str  # finished, failed, or stopped: the same command goes on
    values: list[float] = field(default_factory=list)  # of the metrics, where it finished
    figures: dict[str, float] = field(default_factory=dict)  # all that its summary says
    cause: str | None = None  # in one line, where it failed


def outcome_of(folder: Path, log: Path, code: int | None, metrics: list[str]) -> TrialOutcome:
    """code: the exit code of the training; None where a scheduler has it."""
    summary = _json(folder / SUMMARY)
    figures = figures_of(summary)
    if is_finished(folder) and code in (0, None):
        missing = [metric for metric in metrics if metric not in figures]
        if missing:
            return TrialOutcome("failed", figures=figures, cause=f"diverged: {missing[0]} is no finite number")
        return TrialOutcome("finished", [figures[metric] for metric in metrics], figures)
    job = JobFolder(folder, "")
    ends = [row for row in job.events() if row["event"] == "ended"] if code is None else []
    then = ends[-1].get("then") if ends else None
    # A job that is cancelled while it waits in the queue says nothing of that.
    was_cancelled = code is None and then in (None, "requeued") and job.stop_file.exists()
    if code == EXIT_STOPPED or then == "stopped" or was_cancelled:
        return TrialOutcome("stopped")
    said = (ends[-1].get("cause") if ends else None) or _json(folder / "failure.json").get("cause")
    cause = said or summary.get("error") or _said_in(log) or _how(code)
    line = " ".join(redact_text(str(cause)).split())
    return TrialOutcome("failed", figures=figures, cause=line if len(line) <= 300 else f"{line[:297]}...")


def figures_of(summary: dict[str, Any]) -> dict[str, float]:
    """The finite figures of a summary, under the names of metrics."""
    listed: dict[str, Any] = {name: summary.get(key) for name, key in FIGURES.items()}
    evaluation = summary.get("eval")
    if isinstance(evaluation, dict):
        listed |= {f"eval/{name}": value for name, value in evaluation.items()}
    return {name: float(value) for name, value in listed.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _said_in(log: Path) -> str | None:
    """The line of a log that says best why a training ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    said = [line for line in lines if line.startswith(("ConfigError:", "TrainingError:"))]
    others = [line for line in lines if "Error" in line.split(":", 1)[0]]
    died = [line.removeprefix("supervise: ") for line in lines if line.startswith("supervise: the training died")]
    return next((listed[-1] for listed in (said, others, died) if listed), None)


def _how(code: int | None) -> str:
    if code == EXIT_MISTAKE:
        return "its settings cannot be run"
    return "the job has ended without a result" if code is None else f"exit code {code}"


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """The values of a metric by optimizer step, as far as the trial has come."""
    rows = read_rows(folder / "metrics.jsonl")
    points = {int(row["step"]): float(row[metric]) for row in rows if _is_number(row.get(metric))}
    return sorted(points.items())
