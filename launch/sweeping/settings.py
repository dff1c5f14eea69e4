"""The settings of a sweep: hydra.sweeper.*, with the names of hydra-optuna-sweeper where it has them."""

import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from tunesmith.train.config.schema.checks import check_no_empty_text, check_not_negative, check_positive
from tunesmith.train.errors import ConfigError

GROUP = "hydra.sweeper"
STUDY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
DEFAULT_TRIALS = 20  # of random and tpe; hydra-optuna-sweeper's own
HIGHER_IS_BETTER = {"eval/exact_match", "eval/rouge_l", "eval/token_accuracy", "throughput/tokens_per_second"} | {
    "throughput/mfu"
}
LOWER_IS_BETTER = {"eval/loss", "eval/perplexity", "train/loss", "memory/peak_memory_gib", "time/train_seconds"}
METRICS = sorted(HIGHER_IS_BETTER | LOWER_IS_BETTER)
LIVE_METRICS = ("eval/loss", "train/loss")  # those that a pruner can follow step by step


class Sampler(StrEnum):
    grid = "grid"
    random = "random"
    tpe = "tpe"


class Pruner(StrEnum):
    none = "none"
    median = "median"
    asha = "asha"


def mistake(name: str, what: str, do: str) -> ConfigError:
    """What is wrong with a setting of the sweep."""
    return ConfigError(what, key=f"{GROUP}.{name}", do=do)


@dataclass(kw_only=True)
class SweeperConfig:
    """How a space is searched."""

    sampler: Sampler = Sampler.grid  # grid: every combination once; random; tpe: Bayesian, Optuna's TPE
    params: dict[str, str] = field(default_factory=dict)  # the search space: a key and its values, in Hydra's grammar
    metric: Any = "eval/loss"  # what is to be good, of summary.json; a list: several, and the result is a Pareto set
    direction: Any = None  # minimize or maximize, for each metric; null: as the metric is meant
    n_trials: int | None = None  # trials of the sweep in all, failed ones too; null: the whole grid, or 20
    n_jobs: int = 1  # trials side by side, of this command
    ranks_per_trial: int | None = None  # ranks of a trial, a GPU each where there are any; null: GPUs / n_jobs, or 1
    max_hours: float | None = None  # hours in which trials ran; after them none is started; null: no limit
    max_gpu_hours: float | None = None  # the same, times the GPUs of each trial; null: no limit
    study_name: str | None = (
        None  # of the sweep: folder, W&B group, experiment; null: <name>-<hash of what is searched>
    )
    storage: str | None = None  # database of the trials, such as postgresql://...; null: study.db in the folder
    seed: int = 0  # of random and tpe
    n_startup_trials: int = 5  # random trials with which tpe begins
    pruner: Pruner = Pruner.none  # stop bad trials early: median (worse than half of the others), asha (halving)
    pruner_warmup_steps: int = 0  # optimizer steps in which no trial is stopped early
    reduction_factor: int = 4  # asha: one of so many trials goes on at each rung

    def __post_init__(self) -> None:
        counts = ("n_trials", "n_jobs", "ranks_per_trial", "max_hours", "max_gpu_hours", "n_startup_trials")
        check_positive(GROUP, **{name: getattr(self, name) for name in counts})
        check_not_negative(GROUP, seed=self.seed, pruner_warmup_steps=self.pruner_warmup_steps)
        check_no_empty_text(self, f"{GROUP}.")
        if self.reduction_factor < 2:
            raise mistake(
                "reduction_factor", f"reduction_factor={self.reduction_factor} stops no trial.", "give 2 or more."
            )
        if self.study_name is not None and not STUDY_NAME.fullmatch(self.study_name):
            what = f"{self.study_name!r} cannot name a folder and an experiment."
            raise mistake("study_name", what, "use letters, digits, - and _.")
        for name, value in self.params.items():
            if not isinstance(value, str):
                do = "write a line for each key, such as `adapter.r: choice(8, 16)`."
                raise mistake("params", f"{name} has no values in Hydra's grammar.", do)
        self._check_metrics()

    def _check_metrics(self) -> None:
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            what = f"{unknown[0]!r} is no figure of a finished run."
            raise mistake("metric", what, f"choose one or several of {', '.join(METRICS)}.")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise mistake("metric", "metric needs one or several figures.", "name each once.")
        given = _listed(self.direction)
        if given and (len(given) != len(self.metrics) or set(given) - {"minimize", "maximize"}):
            what = f"direction={self.direction} does not say minimize or maximize for each of the metrics."
            raise mistake("direction", what, f"give {len(self.metrics)}, or leave it out.")
        if self.pruner is not Pruner.none and (len(self.metrics) > 1 or self.metrics[0] not in LIVE_METRICS):
            what = f"pruner={self.pruner} cannot follow {', '.join(self.metrics)} step by step."
            raise mistake("pruner", what, f"let metric be {' or '.join(LIVE_METRICS)}, or pruner=none.")

    @property
    def metrics(self) -> list[str]:
        return _listed(self.metric)

    @property
    def directions(self) -> list[str]:
        """minimize or maximize for each metric."""
        meant = ["maximize" if metric in HIGHER_IS_BETTER else "minimize" for metric in self.metrics]
        return _listed(self.direction) or meant


SETTINGS = [one.name for one in fields(SweeperConfig)]


def _listed(value: Any) -> list[str]:
    items = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    return [str(item) for item in items]
