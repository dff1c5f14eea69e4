"""What is known of a sweep at a moment: its trials, their figures, the best ones. The report is made of it."""

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tunesmith.launch.sweeping.outcome import curve
from tunesmith.launch.sweeping.plan import Plan
from tunesmith.launch.sweeping.space import Interval
from tunesmith.launch.sweeping.trials import STATES, Trials, seconds_of, spans_of

CURVE = "eval/loss"  # drawn for every trial; the training loss where there are no evaluations
ENOUGH_FOR_IMPORTANCE = 4  # finished trials


@dataclass(frozen=True)
class Row:
    """One trial."""

    number: int
    status: str  # finished, pruned, failed, running, stopped
    params: dict[str, Any]
    values: list[float] | None  # of the metrics
    figures: dict[str, float]
    seconds: float
    cause: str | None
    curve: list[tuple[int, float]]
    curve_metric: str
    folder: str


@dataclass(frozen=True)
class Result:
    """The whole sweep."""

    name: str
    status: str  # finished, or running: trials are left or under way
    metrics: list[str]
    directions: list[str]
    rows: list[Row]
    best: list[int]  # the best trial; of several metrics the Pareto set
    importances: dict[str, float]
    hours: float
    gpu_hours: float
    log_keys: frozenset[str]  # parameters that were searched in the logarithm
    num_trials: int

    def as_dict(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return {
            "name": self.name,
            "status": self.status,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "metrics": dict(zip(self.metrics, self.directions, strict=True)),
            "num_trials": self.num_trials,
            "counts": self.counts(),
            "best": self.best,
            "importances": self.importances,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "trials": [
                {
                    "number": row.number,
                    "status": row.status,
                    "params": row.params,
                    "values": row.values,
                    "figures": row.figures,
                    "seconds": round(row.seconds, 1),
                    "cause": row.cause,
                    "folder": row.folder,
                }
                for row in self.rows
            ],
        }

    def counts(self) -> dict[str, int]:
        """Trials by status."""
        statuses = [row.status for row in self.rows]
        return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def read_result(plan: Plan, trials: Trials) -> Result:
    """What the database and the run folders say."""
    frozen = [trial for trial in trials.all() if trial.state is not TrialState.WAITING]
    rows = [_row(plan, trials, trial) for trial in frozen]
    spans = [
        list(spans_of(trial.user_attrs, plan.trial_folder(trial.number), is_running=row.status == "running"))
        for trial, row in zip(frozen, rows, strict=True)
    ]
    gpus = [int(trial.user_attrs.get("gpus", 0)) for trial in frozen]
    gpu_seconds = sum(count * sum(end - start for start, end in own) for count, own in zip(gpus, spans, strict=True))
    has_all = len(frozen) >= plan.num_trials and all(row.status in STATES.values() for row in rows)
    return Result(
        name=plan.study_name,
        status="finished" if has_all else "unfinished",
        metrics=plan.settings.metrics,
        directions=plan.settings.directions,
        rows=rows,
        best=best_trials(trials),
        importances=_importances(trials),
        hours=seconds_of([span for own in spans for span in own]) / 3600,
        gpu_hours=gpu_seconds / 3600,
        log_keys=frozenset(
            key for key, one in plan.space.dimensions.items() if isinstance(one, Interval) and one.is_log
        ),
        num_trials=plan.num_trials,
    )


def best_trials(trials: Trials) -> list[int]:
    """The number of the best trial, or of those that no other is better than in every metric. Empty without one."""
    return sorted(trial.number for trial in trials.study.best_trials) if _finished(trials) else []


def _finished(trials: Trials) -> list[FrozenTrial]:
    return [trial for trial in trials.all() if trial.state is TrialState.COMPLETE]


def _row(plan: Plan, trials: Trials, trial: FrozenTrial) -> Row:
    folder = plan.trial_folder(trial.number)
    status = STATES.get(trial.state)
    if status is None:
        held = trials.is_mine(trial.number) or trials.is_held_elsewhere(trial)
        status = "running" if held else "stopped"
    metric = CURVE if plan.config.evaluate.every_steps else "train/loss"
    spans = spans_of(trial.user_attrs, folder, is_running=status == "running")
    return Row(
        number=trial.number,
        status=status,
        params=dict(trial.params),
        values=list(trial.values) if trial.values is not None else None,
        figures=trial.user_attrs.get("figures", {}),
        seconds=sum(end - start for start, end in spans),
        cause=trial.user_attrs.get("cause"),
        curve=curve(folder, metric),
        curve_metric=metric,
        folder=str(folder),
    )


def _importances(trials: Trials) -> dict[str, float]:
    """Share of each parameter in how good a trial becomes, by the first metric; empty while there is too little."""
    finished = _finished(trials)
    values = {trial.values[0] for trial in finished if trial.values}
    varied = [key for key in (finished[0].params if finished else {}) if len({t.params.get(key) for t in finished}) > 1]
    if len(finished) < ENOUGH_FOR_IMPORTANCE or len(values) < 2 or not varied:
        return {}
    if len(varied) == 1:
        return {varied[0]: 1.0}
    sign = 1.0 if trials.study.directions[0] is StudyDirection.MINIMIZE else -1.0  # it explains low values
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes the importances of params to")
        found = get_param_importances(
            trials.study,
            evaluator=PedAnovaImportanceEvaluator(evaluate_on_local=False),
            params=varied,
            target=lambda trial: sign * float((trial.values or [math.nan])[0]),
        )
    return {key: value for key, value in found.items() if math.isfinite(value)}
