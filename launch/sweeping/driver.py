"""The loop of a sweep: start trials where there is room, follow them, note how they ended, until none is left."""

import signal
import sys
import time
from dataclasses import dataclass, field
from types import FrameType

from optuna.trial import Trial, TrialState

from tunesmith.launch.sweeping.hours import budget_spent, note_end, note_start
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.report import write_report
from tunesmith.launch.sweeping.settings import Pruner
from tunesmith.launch.sweeping.slots import NotNow, Slots, StartedTrial, is_busy
from tunesmith.launch.sweeping.trial_outcome import TrialOutcome, curve, outcome_of
from tunesmith.launch.sweeping.trials import STATES, Trials
from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import TunesmithError
from tunesmith.train.files.run_folder import JOB
from tunesmith.train.files.step_folders import newest_checkpoint
from tunesmith.train.ranks.stop import SIGNALS
from tunesmith.train.redact import on_screen, redact_text
from tunesmith.train.track.console import duration, figure

LOOK_SECONDS = 0.2
FOLLOW_SECONDS = 1.0  # between two looks at the metrics of a running trial
FILL_SECONDS = 2.0  # between two looks for a further trial, while others run
REPORT_SECONDS = 60.0  # between two reports while nothing else happens


@dataclass
class ClaimedTrial:
    """A trial that this driver has claimed."""

    trial: Trial
    started: StartedTrial | None = None  # None while an earlier attempt still ends
    since: float = field(default_factory=time.monotonic)
    followed: float = 0.0
    reported: set[int] = field(default_factory=set)  # steps
    is_pruned: bool = False

    @property
    def number(self) -> int:
        return self.trial.number


class SweepDriver:
    """Runs the trials of one command."""

    def __init__(self, plan: SweepPlan, trials: Trials, slots: Slots) -> None:
        self.plan, self.trials = plan, trials
        self.asked: str | None = None  # the signal that ended it
        self.budget_spent: str | None = None  # the limit that ended it, in words
        self._slots = slots
        self._claimed: dict[int, ClaimedTrial] = {}
        self._reported = 0.0
        self._filled = 0.0
        self._not_before = 0.0  # no trial is started until then
        self._said: str | None = None  # why

    def announce(self) -> None:
        """Says what is about to happen."""
        plan, settings = self.plan, self.plan.settings
        goals = ", ".join(f"{way} {metric}" for metric, way in zip(settings.metrics, settings.directions, strict=True))
        say(f"{plan.study_name}: {plan.num_trials} trials ({settings.sampler}) to {goals}; folder {plan.folder}")
        if ended := sum(trial.state in STATES for trial in self.trials.all()):
            say(f"{ended} of them have ended before and are not run again")

    def run(self) -> None:
        """Returns when no trial is left for it, the budget is spent, or it was asked to stop."""
        kept = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            while self._step():
                time.sleep(LOOK_SECONDS)
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name

    def _step(self) -> bool:
        for claimed in list(self._claimed.values()):
            self._look(claimed)
        if self.asked:
            for claimed in list(self._claimed.values()):
                if claimed.started is not None:
                    claimed.started.stop()
                else:
                    self._give_back(claimed)
        elif not self._fill() and not self._claimed:
            return False
        if time.monotonic() - self._reported > REPORT_SECONDS:
            self._report()
        return bool(self._claimed) or not self.asked

    def _give_back(self, claimed: ClaimedTrial) -> None:
        self.trials.give_back(claimed.number)
        del self._claimed[claimed.number]

    def _fill(self) -> bool:
        """Starts what there is room for; False when nothing was started because there is nothing to start."""
        if time.monotonic() < self._not_before or (self._claimed and time.monotonic() - self._filled < FILL_SECONDS):
            return True
        self._filled = time.monotonic()
        while len(self._claimed) < self.plan.settings.n_jobs and time.monotonic() >= self._not_before:
            if not self._slots.has_room():
                return True
            self.budget_spent = budget_spent(self.plan, self.trials)
            trial = self.trials.claim_next(may_begin=self.budget_spent is None)
            if trial is None:
                return False
            known = self.trials.study.trials[trial.number].intermediate_values
            self._claimed[trial.number] = ClaimedTrial(trial, reported=set(known))
            self._start(self._claimed[trial.number])
        return True

    def _start(self, claimed: ClaimedTrial) -> None:
        trial, folder = claimed.trial, self.plan.trial_folder(claimed.number)
        if is_busy(folder) and not (folder / JOB / "job.json").is_file():  # a job is found in the queue again
            return  # looked at again in the next round
        overrides = self.plan.overrides(trial.number, trial.params)
        goes_on = newest_checkpoint(folder)
        if goes_on:
            overrides.append("resume.source=auto")
        trial.set_user_attr("overrides", overrides)
        try:
            compose_config(overrides, self.plan.config_dir)  # a combination that no training takes, a changed file
            claimed.started = self._slots.start(trial.number, overrides, trial.user_attrs.get("job_id"))
        except NotNow as error:
            self._wait(claimed, error)
            return
        except TunesmithError as error:
            note_start(trial, self.plan.gpus)
            cause = redact_text(f"{type(error).__name__}: {error.what}")
            self._end(claimed, TrialOutcome("failed", cause=cause))
            return
        note_start(trial, self.plan.gpus)
        self._said = None
        if job_id := getattr(claimed.started, "job_id", None):
            trial.set_user_attr("job_id", job_id)
        again = f" again, from step {goes_on}" if goes_on else " again" if len(trial.user_attrs["spans"]) > 1 else ""
        params = " ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in trial.params.items())
        say(f"trial {trial.number} starts{again} {claimed.started.described()}: {params}")

    def _wait(self, claimed: ClaimedTrial, error: NotNow) -> None:
        """Gives the trial back, for whoever can start it first: this driver looks again a while later."""
        self._give_back(claimed)
        self._not_before = time.monotonic() + error.seconds
        if str(error) != self._said:
            self._said = str(error)
            say(f"trial {claimed.number} waits, and is tried again every {error.seconds:g} s: {error}")

    def _look(self, claimed: ClaimedTrial) -> None:
        if claimed.started is None:
            if not self.asked:
                self._start(claimed)
        elif not claimed.started.has_ended():
            self._follow(claimed)
        else:
            self._follow(claimed, last=True)
            folder, log = self.plan.trial_folder(claimed.number), self.plan.log(claimed.number)
            self._end(claimed, outcome_of(folder, log, claimed.started.exit_code(), self.plan.settings.metrics))

    def _follow(self, claimed: ClaimedTrial, *, last: bool = False) -> None:
        """Tells the study how the trial does, and stops it when the others did better."""
        settings = self.plan.settings
        if settings.pruner is Pruner.none or (not last and time.monotonic() - claimed.followed < FOLLOW_SECONDS):
            return
        claimed.followed = time.monotonic()
        is_hopeless = False
        for step, value in curve(self.plan.trial_folder(claimed.number), settings.metrics[0]):
            if step not in claimed.reported:
                claimed.trial.report(value, step)
                claimed.reported.add(step)
                is_hopeless |= claimed.trial.should_prune()  # at each step: asha notes there how far the trial came
        if last:
            return
        claimed.is_pruned |= is_hopeless
        if claimed.is_pruned and claimed.started is not None:
            claimed.started.stop()  # more than once: SLURM may not have answered

    def _end(self, claimed: ClaimedTrial, outcome: TrialOutcome) -> None:
        trial, study = claimed.trial, self.trials.study
        note_end(trial)
        if outcome.figures:
            trial.set_user_attr("figures", outcome.figures)
        if outcome.status == "finished":
            study.tell(trial, outcome.values)
        elif claimed.is_pruned and outcome.status == "stopped":
            study.tell(trial, state=TrialState.PRUNED)
            outcome = TrialOutcome("pruned")
        elif outcome.status == "stopped" and not self.asked:
            outcome = TrialOutcome("failed", cause="somebody else stopped it")
        if outcome.status == "failed":
            trial.set_user_attr("cause", outcome.cause)
            study.tell(trial, state=TrialState.FAIL)
        self._give_back(claimed)
        self._filled = 0.0
        after = duration(time.monotonic() - claimed.since)
        say(f"trial {trial.number} {self._in_words(claimed.number, outcome, after)}")
        self._report()

    def _in_words(self, number: int, outcome: TrialOutcome, after: str) -> str:
        metrics = self.plan.settings.metrics
        if outcome.status == "finished":
            pairs = zip(metrics, outcome.values, strict=True)
            best = ", the best so far" if number in self.trials.best() else ""
            return (
                f"finished after {after}: {', '.join(f'{name} {figure(name, value)}' for name, value in pairs)}{best}"
            )
        if outcome.status == "pruned":
            step, value = max(curve(self.plan.trial_folder(number), metrics[0]), default=(0, 0.0))
            said = f"{metrics[0]} {figure(metrics[0], value)} at step {step} is behind the others"
            return f"stopped early after {after}: {said}"
        if outcome.status == "stopped":
            return f"stopped after {after}; the same command goes on"
        return f"failed after {after}: {outcome.cause}"

    def _report(self) -> None:
        self._reported = time.monotonic()
        try:
            write_report(self.plan, self.trials)
        except OSError as error:
            say(f"the report cannot be written: {error.strerror}")


def say(text: str) -> None:
    sys.stdout.write(f"sweep: {on_screen(text)}\n")
    sys.stdout.flush()
