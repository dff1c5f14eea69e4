"""The trials of a sweep, in a database that several drivers may share.

    running      somebody trains it, or has: a driver holds claims/<number>.lock for as long as it lives. One that
                 nobody holds was stopped, or its driver was killed: the next driver goes on with it in its own folder
    complete, pruned, failed     never run again

A lock is the system's, so it is free as soon as its process has ended, however it ended.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from filelock import FileLock, Timeout
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import create_engine

from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.proposals import propose
from tunesmith.launch.sweeping.settings import GROUP, Pruner, SweeperConfig
from tunesmith.train.errors import ConfigError
from tunesmith.train.redact import redact_text

BUSY_SECONDS = 60.0  # that a driver waits for another one's write
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}  # those that ended


class Trials:
    """The study of one sweep, seen by one driver."""

    def __init__(self, plan: SweepPlan) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan = plan
        self._claims: dict[int, FileLock] = {}
        self._turn = FileLock(plan.claims / "study.lock")
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

    def best(self) -> list[int]:
        """The number of the best trial, or of those that no other is better than in every metric. Empty without one."""
        has_finished = any(trial.state is TrialState.COMPLETE for trial in self.all())
        return sorted(trial.number for trial in self.study.best_trials) if has_finished else []

    def claim_next(self, *, may_begin: bool) -> Trial | None:
        """A trial that nobody runs and that has not ended; else a new one, if it may begin and one is left."""
        with self._turn:
            trials = self.all()
            for trial in trials:
                if trial.state is TrialState.RUNNING and self._claim(trial.number):
                    return Trial(self.study, trial._trial_id)
            if not may_begin or len(trials) >= self._plan.num_trials:
                return None
            point = propose(self._plan.space, self._plan.settings, trials)
            if point is None:
                return None
            self.study.add_trial(
                create_trial(state=TrialState.RUNNING, params=point, distributions=dict(self._plan.space.dimensions))
            )
            begun = self.all()[-1]
            self._claim(begun.number)
            return Trial(self.study, begun._trial_id)

    def close(self) -> None:
        """Gives everything back: a driver that is killed does the same."""
        for number in list(self._claims):
            self.give_back(number)
        self._storage.remove_session()
        self._storage.engine.dispose()

    def give_back(self, number: int) -> None:
        """The trial is not run by this driver any more."""
        self._claims.pop(number).release()

    def is_run(self, trial: FrozenTrial) -> bool:
        """Whether a living driver runs it, this one or another."""
        if trial.state is not TrialState.RUNNING or trial.number in self._claims:
            return trial.state is TrialState.RUNNING
        with self._turn:  # or a driver that claims it just now would find the lock taken
            is_free = self._claim(trial.number)
            if is_free:
                self.give_back(trial.number)
        return not is_free

    def _claim(self, number: int) -> bool:
        if number in self._claims:
            return False
        lock = FileLock(self._plan.claims / f"{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._claims[number] = lock
        return True


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


def make_pruner(plan: SweepPlan) -> BasePruner:
    """Optuna's pruner. Steps are those of the optimizer."""
    settings = plan.settings
    if settings.pruner is Pruner.median:
        return MedianPruner(n_startup_trials=3, n_warmup_steps=settings.pruner_warmup_steps)
    if settings.pruner is Pruner.asha:
        rung = max(settings.pruner_warmup_steps, plan.config.evaluate.every_steps or 1)
        return SuccessiveHalvingPruner(min_resource=rung, reduction_factor=settings.reduction_factor)
    return NopPruner()
