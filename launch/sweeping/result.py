"""What is known of a sweep at a moment: its trials, their figures, the best ones. The report is made of it."""

import itertools
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tunesmith.launch.sweeping.hours import hours_of, spans_of
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.trial_outcome import curve
from tunesmith.launch.sweeping.trials import STATES, Trials
from tunesmith.train.track.console import figure

CURVE = "eval/loss"  # drawn for every trial; the training loss where there are no evaluations
ENOUGH_FOR_IMPORTANCE = 4  # finished trials


@dataclass(frozen=True)
class TrialRow:
    """One trial."""

    number: int
    status: str  # finished, pruned, failed, running, stopped
    params: dict[str, Any]
    values: list[float] | None  # of the metrics
    figures: dict[str, float]
    seconds: float
    cause: str | None
    folder: str
    curve: list[tuple[int, float]]

    @property
    def value(self) -> float:
        """Of the first metric. Only where there is one."""
        return self.values[0] if self.values else math.nan


@dataclass(frozen=True)
class SweepResult:
    """The whole sweep."""

    name: str
    status: str  # finished, or unfinished: trials are left or under way
    metrics: dict[str, str]  # name: minimize or maximize
    rows: list[TrialRow]
    best: list[int]  # the best trial; of several metrics the Pareto set
    importances: dict[str, float]
    hours: float
    gpu_hours: float
    num_trials: int
    log_keys: frozenset[str]  # parameters that were searched in the logarithm
    curve_metric: str

    def as_dict(self) -> dict[str, Any]:
        """The content of sweep.json."""
        trials = [vars(row) | {"seconds": round(row.seconds, 1)} for row in self.rows]
        for trial in trials:
            del trial["curve"]
        tree = vars(self) | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "counts": self.counts(), "trials": trials}
        for name in ("rows", "log_keys", "curve_metric"):
            del tree[name]
        return tree

    def counts(self) -> dict[str, int]:
        """Trials by status."""
        statuses = [row.status for row in self.rows]
        return {status: statuses.count(status) for status in dict.fromkeys(statuses)}

    @property
    def metric(self) -> str:
        """The first one."""
        return next(iter(self.metrics))

    @property
    def direction(self) -> str:
        return self.metrics[self.metric]

    @property
    def done(self) -> list[TrialRow]:
        """The finished trials."""
        return [row for row in self.rows if row.values]

    @property
    def keys(self) -> list[str]:
        """The parameters of the trials."""
        return list(dict.fromkeys(key for row in self.rows for key in row.params))

    @property
    def columns(self) -> list[str]:
        """Of a table of the trials; cells() has what stands in them."""
        return ["trial", "status", *self.metrics, *self.keys]

    def cells(self, row: TrialRow) -> list[str]:
        values = row.values or itertools.repeat(None)
        params = [row.params.get(key, "") for key in self.keys]
        return [
            *(str(row.number), row.status),
            *(figure(name, value) for name, value in zip(self.metrics, values, strict=False)),
            *(f"{param:.4g}" if isinstance(param, float) else str(param) for param in params),
        ]


def read_result(plan: SweepPlan, trials: Trials) -> SweepResult:
    """What the database and the run folders say."""
    metric = CURVE if plan.config.evaluate.every_steps else "train/loss"
    rows = [_row(plan, trials, trial, metric) for trial in trials.all()]
    hours, gpu_hours = hours_of(plan, trials)
    has_all = len(rows) >= plan.num_trials and all(row.status in STATES.values() for row in rows)
    return SweepResult(
        name=plan.study_name,
        status="finished" if has_all else "unfinished",
        metrics=dict(zip(plan.settings.metrics, plan.settings.directions, strict=True)),
        rows=rows,
        best=trials.best(),
        importances=_importances(trials),
        hours=hours,
        gpu_hours=gpu_hours,
        num_trials=plan.num_trials,
        log_keys=frozenset(key for key, one in plan.space.dimensions.items() if getattr(one, "log", False)),
        curve_metric=metric,
    )


def _row(plan: SweepPlan, trials: Trials, trial: FrozenTrial, curve_metric: str) -> TrialRow:
    folder, is_running = plan.trial_folder(trial.number), trials.is_run(trial)
    return TrialRow(
        number=trial.number,
        status=STATES.get(trial.state) or ("running" if is_running else "stopped"),
        params=dict(trial.params),
        values=list(trial.values) if trial.values is not None else None,
        figures=trial.user_attrs.get("figures", {}),
        seconds=sum(until - since for since, until in spans_of(trial, folder, is_running=is_running)),
        cause=trial.user_attrs.get("cause"),
        folder=str(folder),
        curve=curve(folder, curve_metric),
    )


def _importances(trials: Trials) -> dict[str, float]:
    """Share of each parameter in how good a trial becomes, by the first metric; empty while there is too little."""
    finished = [trial for trial in trials.all() if trial.state is TrialState.COMPLETE]
    values = {trial.values[0] for trial in finished if trial.values}
    varied = [key for key in (finished[0].params if finished else {}) if len({t.params.get(key) for t in finished}) > 1]
    if len(finished) < ENOUGH_FOR_IMPORTANCE or len(values) < 2 or not varied:
        return {}
    if len(varied) == 1:
        return {varied[0]: 1.0}
    sign = 1.0 if trials.study.directions[0] is StudyDirection.MINIMIZE else -1.0  # it explains low values
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes the importances of params to")
        shares = get_param_importances(
            trials.study,
            evaluator=PedAnovaImportanceEvaluator(evaluate_on_local=False),
            params=varied,
            target=lambda trial: sign * float((trial.values or [math.nan])[0]),
        )
    return {key: share for key, share in shares.items() if math.isfinite(share)}
