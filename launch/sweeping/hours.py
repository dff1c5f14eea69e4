"""When the trials of a sweep ran: what its budget counts, and what its report says."""

import time
from collections.abc import Iterator
from pathlib import Path

from optuna.trial import FrozenTrial, Trial

from tunesmith.launch.cluster.job_folder import JobFolder
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.trials import Trials

Span = tuple[float, float]  # from and until, unix seconds


def note_start(trial: Trial, gpus: int) -> None:
    """Notes down that a trial starts, or starts again."""
    trial.set_user_attr("spans", [*trial.user_attrs.get("spans", []), [time.time(), None]])
    trial.set_user_attr("gpus", gpus)


def note_end(trial: Trial) -> None:
    *before, last = trial.user_attrs["spans"]
    trial.set_user_attr("spans", [*before, [last[0], time.time()]])


def spans_of(trial: FrozenTrial, folder: Path, *, is_running: bool) -> list[Span]:
    """When a trial ran. An attempt whose driver was killed lasted until its last row.

    A job of SLURM writes down itself when it ran: its time in the queue does not count.
    """
    is_job = bool(trial.user_attrs.get("job_id"))
    spans = list(_spans_of_job(folder)) if is_job else trial.user_attrs.get("spans", [])
    metrics = folder / "metrics.jsonl"
    last_row = metrics.stat().st_mtime if metrics.is_file() and not is_job else 0.0
    ended = [(since, until or max(since, last_row)) for since, until in spans]
    if is_running and spans and spans[-1][1] is None:
        ended[-1] = (spans[-1][0], time.time())
    return ended


def _spans_of_job(folder: Path) -> Iterator[tuple[float, float | None]]:
    since: float | None = None
    for event in JobFolder(folder, "").events():
        if event["event"] == "started" and since is None:
            since = float(event["time"])
        elif event["event"] == "ended" and since is not None:
            yield since, float(event["time"])
            since = None
    if since is not None:
        yield since, None


def hours_of(plan: SweepPlan, trials: Trials) -> tuple[float, float]:
    """Hours in which at least one trial was running, where overlaps count once; and the hours of all their GPUs."""
    spans: list[Span] = []
    gpu_seconds = 0.0
    for trial in trials.all():
        own = spans_of(trial, plan.trial_folder(trial.number), is_running=trials.is_run(trial))
        spans += own
        gpu_seconds += sum(until - since for since, until in own) * int(trial.user_attrs.get("gpus", 0))
    seconds, latest = 0.0, 0.0
    for since, until in sorted(spans):
        seconds += max(0.0, until - max(since, latest))
        latest = max(latest, until)
    return seconds / 3600, gpu_seconds / 3600


def budget_spent(plan: SweepPlan, trials: Trials) -> str | None:
    """The limit of hours that is reached, in words; None while there is time left."""
    limits = {"max_hours": plan.settings.max_hours, "max_gpu_hours": plan.settings.max_gpu_hours}
    hours = hours_of(plan, trials) if any(limits.values()) else ()
    for (name, limit), spent in zip(limits.items(), hours, strict=False):
        if limit is not None and spent >= limit:
            return f"hydra.sweeper.{name}={limit:g} is spent"
    return None
