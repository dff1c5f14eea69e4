"""What came of a trial, read from what its run has left: summary.json, failure.json, metrics.jsonl, its log."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.launch.cluster.job_folder import JobFolder
from tunesmith.train.errors import EXIT_MISTAKE, EXIT_STOPPED
from tunesmith.train.files.rows import read_rows
from tunesmith.train.files.run_folder import is_finished
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
class Outcome:
    """How a trial ended."""

    status: str  # finished, failed, or stopped: the same command goes on
    values: list[float] | None = None  # of the metrics, where it finished
    figures: dict[str, float] | None = None  # all that its summary says
    cause: str | None = None  # in one line, where it failed


def outcome_of(folder: Path, log: Path | None, code: int | None, metrics: list[str]) -> Outcome:
    """code: the exit code of the training; None where a scheduler has it."""
    summary = _json(folder / "summary.json")
    if is_finished(folder) and code in (0, None):
        figures = figures_of(summary)
        values = [figures.get(metric) for metric in metrics]
        if all(value is not None and math.isfinite(value) for value in values):
            return Outcome("finished", [float(value) for value in values if value is not None], figures)
        missing = next(name for name, value in zip(metrics, values, strict=True) if value is None)
        return Outcome("failed", figures=figures, cause=f"diverged: {missing} is no finite number")
    job_end = _last_end(folder) if code is None else {}
    if code == EXIT_STOPPED or (code is None and _was_stopped(folder, job_end.get("then"))):
        return Outcome("stopped")
    said = job_end.get("cause")
    cause = _one_line(str(said)) if said else _cause(folder, log, code, summary)
    return Outcome("failed", figures=figures_of(summary), cause=cause)


def _last_end(folder: Path) -> dict[str, Any]:
    """What a job of SLURM has written down of its end."""
    return next((row for row in reversed(JobFolder(folder, "").events()) if row["event"] == "ended"), {})


def _was_stopped(folder: Path, then: Any) -> bool:
    """then: what the job has said last. One that is cancelled while it waits in the queue says nothing of that."""
    return then == "stopped" or (then in (None, "requeued") and JobFolder(folder, "").stop_file.exists())


def figures_of(summary: dict[str, Any]) -> dict[str, float]:
    """The finite figures of a summary, under the names of metrics."""
    found = {name: summary.get(key) for name, key in FIGURES.items()}
    evaluation = summary.get("eval")
    if isinstance(evaluation, dict):
        found |= {f"eval/{name}": value for name, value in evaluation.items()}
    return {name: float(value) for name, value in found.items() if value is not None and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cause(folder: Path, log: Path | None, code: int | None, summary: dict[str, Any]) -> str:
    failure = _json(folder / "failure.json").get("cause") or summary.get("error")
    if failure:
        return _one_line(str(failure))
    tail = _tail(log) if log else []
    said = next((line for line in reversed(tail) if line.startswith(("ConfigError:", "TrainingError:"))), None)
    said = said or next((line for line in reversed(tail) if "Error" in line.split(":", 1)[0]), None)
    said = said or next((line for line in reversed(tail) if line.startswith("supervise: the training died")), None)
    if said:
        return _one_line(said.removeprefix("supervise: "))
    how = "the job has ended without a result" if code is None else f"exit code {code}"
    return "its settings cannot be run" if code == EXIT_MISTAKE else how


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _one_line(text: str) -> str:
    line = " ".join(redact_text(text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


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
