"""The trials of a sweep, in a database that several drivers may share.

    running      somebody trains it, or has: a driver holds claims/<number>.lock for as long as it lives. One that
                 nobody holds was stopped, or its driver was killed: the next driver takes it up in its own folder
    complete, pruned, failed     never run again

A lock is the system's, so it is free as soon as its process has ended, however it ended.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import create_engine

from tunesmith.launch.cluster.job_folder import JobFolder
from tunesmith.launch.sweeping.plan import Plan
from tunesmith.launch.sweeping.proposals import propose
from tunesmith.launch.sweeping.settings import GROUP, Pruner, SweeperConfig
from tunesmith.train.errors import ConfigError
from tunesmith.train.redact import redact_text

BUSY_SECONDS = 60.0  # that a driver waits for another one's write
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
ENDED = tuple(STATES)


class Trials:
    """The study of one sweep, seen by one driver."""

    def __init__(self, plan: Plan) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan = plan
        self._claims: dict[int, FileLock] = {}
        self._turn = FileLock(plan.folder / "claims" / "study.lock")
        url = plan.settings.storage or f"sqlite:///{plan.folder / 'study.db'}"
        options = {"connect_args": {"timeout": BUSY_SECONDS}} if url.startswith("sqlite:") else {}
        with self._turn, _database_errors():
            self._storage = RDBStorage(url, engine_kwargs=options)
            self.study = optuna.create_study(
                storage=self._storage,
                study_name=plan.study_name,
                directions=[StudyDirection[way.upper()] for way in plan.settings.directions],
                pruner=make_pruner(plan),
                load_if_exists=True,
            )

    def all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def claim_next(self, *, may_begin: bool) -> Trial | None:
        """A trial that nobody runs and that has not ended; else a new one, if it may begin and one is left."""
        with self._turn:
            trials = self.all()
            for trial in trials:
                if trial.state is TrialState.RUNNING and self._claim(trial.number):
                    return self._completed(Trial(self.study, trial._trial_id))
            begun = [trial for trial in trials if trial.state is not TrialState.WAITING]
            if not may_begin or len(begun) >= self._plan.num_trials:
                return None
            if len(begun) == len(trials):
                point = propose(self._plan.space, self._plan.settings, trials)
                if point is None:
                    return None
                self.study.enqueue_trial(point)
            begun_now = self.study.ask(self._plan.space.distributions())
            self._claim(begun_now.number)
            return begun_now

    def close(self) -> None:
        """Gives everything back: a driver that is killed does the same."""
        for number in list(self._claims):
            self.give_back(number)
        self._storage.remove_session()
        self._storage.engine.dispose()

    def give_back(self, number: int) -> None:
        """The trial is not run by this driver any more."""
        self._claims.pop(number).release()

    def is_held_elsewhere(self, trial: FrozenTrial) -> bool:
        """Whether another driver runs it."""
        if trial.state is not TrialState.RUNNING or trial.number in self._claims:
            return False
        with self._turn:  # or a driver that claims it just now would find the lock taken
            try:
                with self._lock(trial.number).acquire(timeout=0):
                    return False
            except Timeout:
                return True

    def is_mine(self, number: int) -> bool:
        return number in self._claims

    def _claim(self, number: int) -> bool:
        if number in self._claims:
            return False
        lock = self._lock(number)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._claims[number] = lock
        return True

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._plan.folder / "claims" / f"{number}.lock")

    def _completed(self, trial: Trial) -> Trial:
        """With all parameters: its driver may have been killed while it wrote them down."""
        for key, one in self._plan.space.distributions().items():
            if isinstance(one, CategoricalDistribution):
                trial.suggest_categorical(key, one.choices)
            elif isinstance(one, IntDistribution):
                trial.suggest_int(key, one.low, one.high, step=one.step, log=one.log)
            elif isinstance(one, FloatDistribution):
                trial.suggest_float(key, one.low, one.high, step=one.step, log=one.log)
        return trial


def check_storage(settings: SweeperConfig) -> None:
    """Raises ConfigError for a database that the user names and that cannot be reached."""
    if settings.storage is not None:
        with _database_errors():
            engine = create_engine(settings.storage)
            engine.connect().close()
            engine.dispose()


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # SQLAlchemy's, and each database's own
        first = redact_text(str(error)).strip().split("\n", 1)[0]
        raise ConfigError(
            f"the database of the trials cannot be used: {type(error).__name__}: {first}.",
            key=f"{GROUP}.storage",
            do="leave it out for a file in the sweep's folder, or give a URL as SQLAlchemy reads it.",
        ) from None


def make_pruner(plan: Plan) -> BasePruner:
    """Optuna's pruner. Steps are those of the optimizer."""
    settings = plan.settings
    if settings.pruner is Pruner.median:
        return MedianPruner(n_startup_trials=3, n_warmup_steps=settings.pruner_warmup_steps)
    if settings.pruner is Pruner.asha:
        rung = max(settings.pruner_warmup_steps, plan.config.evaluate.every_steps or 1)
        return SuccessiveHalvingPruner(min_resource=rung, reduction_factor=settings.reduction_factor)
    return NopPruner()


def begin_attempt(trial: Trial, gpus: int) -> None:
    """Notes that a trial starts, or starts again."""
    spans = [*trial.user_attrs.get("spans", []), [time.time(), None]]
    trial.set_user_attr("spans", spans)
    trial.set_user_attr("gpus", gpus)


def end_attempt(trial: Trial) -> None:
    *before, last = trial.user_attrs["spans"]
    trial.set_user_attr("spans", [*before, [last[0], time.time()]])


def spans_of(user_attrs: Mapping[str, Any], folder: Path, *, is_running: bool) -> Iterator[tuple[float, float]]:
    """When a trial ran, in unix seconds. An attempt whose driver was killed lasted until its last row.

    A job of SLURM writes down itself when it ran: its time in the queue does not count.
    """
    if user_attrs.get("job_id"):
        yield from _spans_of_job(folder, is_running=is_running)
        return
    spans = user_attrs.get("spans", [])
    for number, (start, end) in enumerate(spans):
        if end is None and is_running and number == len(spans) - 1:
            yield start, time.time()
        elif end is None:
            metrics = folder / "metrics.jsonl"
            yield start, max(start, metrics.stat().st_mtime) if metrics.is_file() else start
        else:
            yield start, end


def _spans_of_job(folder: Path, *, is_running: bool) -> Iterator[tuple[float, float]]:
    start: float | None = None
    for event in JobFolder(folder, "").events():
        if event["event"] == "started" and start is None:
            start = float(event["time"])
        elif event["event"] == "ended" and start is not None:
            yield start, float(event["time"])
            start = None
    if start is not None:
        yield start, time.time() if is_running else start


def seconds_of(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one was running: overlaps count once."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
