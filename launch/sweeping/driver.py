"""The loop of a sweep: fill free places with trials, follow them, note how they ended, until nothing is left to do."""

import signal
import sys
import time
from dataclasses import dataclass, field
from types import FrameType

from optuna.trial import Trial, TrialState

from tunesmith.launch.sweeping.hydra_part import check_trial
from tunesmith.launch.sweeping.outcome import Outcome, curve, outcome_of
from tunesmith.launch.sweeping.places import Attempt, NotNow, Place, has_job, is_busy
from tunesmith.launch.sweeping.plan import Plan
from tunesmith.launch.sweeping.report import experiment_commands, write_report
from tunesmith.launch.sweeping.result import best_trials
from tunesmith.launch.sweeping.settings import Pruner
from tunesmith.launch.sweeping.trials import ENDED, Trials, begin_attempt, end_attempt, seconds_of, spans_of
from tunesmith.train.checkpoint.step_folders import newest_checkpoint
from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import TunesmithError
from tunesmith.train.ranks.stop import SIGNALS
from tunesmith.train.redact import redact_text
from tunesmith.train.track.console import duration, figure

LOOK_SECONDS = 0.2
FOLLOW_SECONDS = 1.0  # between two looks at the metrics of a running trial
FILL_SECONDS = 2.0  # between two looks for a further trial, while others run
REPORT_SECONDS = 60.0  # between two reports while nothing else happens


@dataclass
class Running:
    """A trial that this driver has claimed."""

    trial: Trial
    attempt: Attempt | None = None  # None while an earlier attempt still ends
    started: float = field(default_factory=time.monotonic)
    followed: float = 0.0
    reported: set[int] = field(default_factory=set)
    is_pruned: bool = False


class Driver:
    """Runs the trials of one command."""

    def __init__(self, plan: Plan, trials: Trials, place: Place) -> None:
        self.trials, self.folder = trials, plan.folder
        self._plan, self._place = plan, place
        self._running: dict[int, Running] = {}
        self._asked: str | None = None
        self._budget_spent: str | None = None
        self._written = 0.0
        self._filled = 0.0
        self._not_before = 0.0  # no trial is started until then
        self._said: str | None = None  # why

    def announce(self) -> None:
        """Says what is about to happen."""
        plan, ended = self._plan, [trial for trial in self.trials.all() if trial.state in ENDED]
        settings = plan.settings
        goals = ", ".join(f"{way} {metric}" for metric, way in zip(settings.metrics, settings.directions, strict=True))
        say(f"{plan.study_name}: {plan.num_trials} trials ({settings.sampler}) to {goals}; folder {plan.folder}")
        if ended:
            say(f"{len(ended)} of them have ended before and are not run again")

    def best_commands(self) -> list[str]:
        """The commands that run the best trials again."""
        return experiment_commands(self._plan, best_trials(self.trials))

    def run(self) -> None:
        """Returns when no trial is left for it, the budget is spent, or it was asked to stop."""
        kept = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            while self._step():
                time.sleep(LOOK_SECONDS)
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    @property
    def asked(self) -> str | None:
        """The signal that ended it."""
        return self._asked

    @property
    def budget_spent(self) -> str | None:
        """The limit that ended it, in words."""
        return self._budget_spent

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number).name

    def _step(self) -> bool:
        for running in list(self._running.values()):
            self._look(running)
        if self._asked:
            for running in self._running.values():
                if running.attempt is not None:
                    running.attempt.stop()
                else:
                    self._drop(running)
            self._running = {n: one for n, one in self._running.items() if one.attempt is not None}
        elif not self._fill() and not self._running:
            return False
        if time.monotonic() - self._written > REPORT_SECONDS:
            self._report()
        return bool(self._running) or not self._asked

    def _drop(self, running: Running) -> None:
        self.trials.give_back(running.trial.number)

    def _fill(self) -> bool:
        """Starts what there is room for; False when nothing was started because there is nothing to start."""
        if time.monotonic() < self._not_before or (self._running and time.monotonic() - self._filled < FILL_SECONDS):
            return True
        self._filled = time.monotonic()
        while len(self._running) < self._plan.settings.n_jobs:
            if not self._place.has_room():
                return True
            self._budget_spent = budget_spent(self._plan, self.trials)
            trial = self.trials.claim_next(may_begin=self._budget_spent is None)
            if trial is None:
                return False
            running = Running(trial, reported=set(self.trials.study.trials[trial.number].intermediate_values))
            self._running[trial.number] = running
            self._start(running)
            if time.monotonic() < self._not_before:
                return True
        return True

    def _start(self, running: Running) -> None:
        trial = running.trial
        folder = self._plan.trial_folder(trial.number)
        if is_busy(folder) and not has_job(folder):  # a job is found in the queue again
            return  # looked at again in the next round
        overrides = self._plan.overrides(trial.number, trial.params)
        goes_on = newest_checkpoint(folder)
        if goes_on:
            overrides.append("resume.source=auto")
        trial.set_user_attr("overrides", overrides)
        try:
            self._check(overrides)
            running.attempt = self._place.start(trial.number, overrides, trial.user_attrs.get("job_id"))
        except NotNow as error:
            self._wait(running, error)
            return
        except TunesmithError as error:
            begin_attempt(trial, self._plan.gpus)
            self._end(running, Outcome("failed", cause=redact_text(f"{type(error).__name__}: {error.what}")))
            return
        begin_attempt(trial, self._plan.gpus)
        self._said = None
        if job_id := getattr(running.attempt, "job_id", None):
            trial.set_user_attr("job_id", job_id)
        where = running.attempt.described()
        again = f" again, from step {goes_on}" if goes_on else " again" if len(trial.user_attrs["spans"]) > 1 else ""
        say(f"trial {trial.number} starts{again} {where}: {shown_params(trial.params)}")

    def _wait(self, running: Running, error: NotNow) -> None:
        """Gives the trial back, for whoever can start it first: this driver looks again a while later."""
        number = running.trial.number
        self._drop(running)
        del self._running[number]
        self._not_before = time.monotonic() + error.seconds
        if str(error) != self._said:
            self._said = str(error)
            say(f"trial {number} waits, and is tried again every {error.seconds:g} s: {error}")

    def _check(self, overrides: list[str]) -> None:
        """Raises ConfigError for a combination that no training takes, and for a file that was changed meanwhile."""
        compose_config(overrides, self._plan.config_dir)
        check_trial(overrides, self._plan.config_dir)

    def _look(self, running: Running) -> None:
        if running.attempt is None:
            if not self._asked:
                self._start(running)
            return
        ended = running.attempt.poll()
        if ended is None:
            self._follow(running)
            return
        self._follow(running, last=True)
        number = running.trial.number
        folder, log = self._plan.trial_folder(number), self._plan.log(number)
        self._end(running, outcome_of(folder, log, ended.code, self._plan.settings.metrics))

    def _follow(self, running: Running, *, last: bool = False) -> None:
        """Tells the study how the trial does, and stops it when the others did better."""
        settings = self._plan.settings
        if settings.pruner is Pruner.none or (not last and time.monotonic() - running.followed < FOLLOW_SECONDS):
            return
        running.followed = time.monotonic()
        folder = self._plan.trial_folder(running.trial.number)
        new = [(step, value) for step, value in curve(folder, settings.metrics[0]) if step not in running.reported]
        is_hopeless = False
        for step, value in new:
            running.trial.report(value, step)
            running.reported.add(step)
            is_hopeless |= running.trial.should_prune()  # asked at each step: asha notes there how far the trial came
        if last:
            return
        running.is_pruned |= is_hopeless
        if running.is_pruned:
            assert running.attempt is not None
            running.attempt.stop()  # more than once: SLURM may not have answered

    def _end(self, running: Running, outcome: Outcome) -> None:
        trial, study = running.trial, self.trials.study
        end_attempt(trial)
        if outcome.figures:
            trial.set_user_attr("figures", outcome.figures)
        was_asked = self._asked is not None
        if outcome.status == "finished":
            study.tell(trial, outcome.values)
        elif running.is_pruned and outcome.status == "stopped":
            study.tell(trial, state=TrialState.PRUNED)
            outcome = Outcome("pruned")
        elif outcome.status == "stopped" and not was_asked:
            outcome = Outcome("failed", cause="somebody else stopped it")
        if outcome.status == "failed":
            trial.set_user_attr("cause", outcome.cause)
            study.tell(trial, state=TrialState.FAIL)
        self.trials.give_back(trial.number)
        del self._running[trial.number]
        self._filled = 0.0
        say(f"trial {trial.number} {self._ended_words(running, outcome)}")
        self._report()

    def _ended_words(self, running: Running, outcome: Outcome) -> str:
        metrics = self._plan.settings.metrics
        after = f"after {duration(time.monotonic() - running.started)}"
        if outcome.status == "finished":
            values = [
                f"{name} {figure(name, value)}" for name, value in zip(metrics, outcome.values or [], strict=True)
            ]
            return f"finished {after}: {', '.join(values)}{self._best_words(running.trial.number)}"
        if outcome.status == "pruned":
            step, value = max(curve(self._plan.trial_folder(running.trial.number), metrics[0]), default=(0, 0.0))
            return (
                f"stopped early {after}: {metrics[0]} {figure(metrics[0], value)} at step {step} is behind the others"
            )
        if outcome.status == "stopped":
            return f"stopped {after}; the same command goes on"
        return f"failed {after}: {outcome.cause}"

    def _best_words(self, number: int) -> str:
        return ", the best so far" if number in {trial.number for trial in self.trials.study.best_trials} else ""

    def _report(self) -> None:
        self._written = time.monotonic()
        try:
            write_report(self._plan, self.trials)
        except OSError as error:
            say(f"the report cannot be written: {error.strerror}")


def budget_spent(plan: Plan, trials: Trials) -> str | None:
    """The limit of hours that is reached, in words; None while there is time left."""
    settings = plan.settings
    if settings.max_hours is None and settings.max_gpu_hours is None:
        return None
    spans: list[tuple[float, float]] = []
    gpu_seconds = 0.0
    for trial in trials.all():
        is_running = trials.is_mine(trial.number) or trials.is_held_elsewhere(trial)
        own = list(spans_of(trial.user_attrs, plan.trial_folder(trial.number), is_running=is_running))
        spans += own
        gpu_seconds += sum(end - start for start, end in own) * int(trial.user_attrs.get("gpus", 0))
    if settings.max_hours is not None and seconds_of(spans) >= settings.max_hours * 3600:
        return f"hydra.sweeper.max_hours={settings.max_hours:g} is spent"
    if settings.max_gpu_hours is not None and gpu_seconds >= settings.max_gpu_hours * 3600:
        return f"hydra.sweeper.max_gpu_hours={settings.max_gpu_hours:g} is spent"
    return None


def shown_params(params: dict[str, object]) -> str:
    """optimizer.learning_rate=0.000123 adapter.r=8"""
    return " ".join(f"{key}={f'{value:.4g}' if isinstance(value, float) else value}" for key, value in params.items())


def say(text: str) -> None:
    sys.stdout.write(f"sweep: {redact_text(text)}\n")
    sys.stdout.flush()
