"""One optimizer step, and the loop around it."""

import contextlib
import gc
import math
import time
from collections.abc import Callable

import torch

from tunesmith.train.data.store import Batch
from tunesmith.train.engine import Engine
from tunesmith.train.errors import Stopped, TrainingError
from tunesmith.train.objective.objective import Objective, add_to
from tunesmith.train.ranks.distributed import numbers_on, sum_over_ranks
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import progress, reach
from tunesmith.train.ranks.state import Step
from tunesmith.train.ranks.step_vote import StepConsensus, StepVote
from tunesmith.train.run import best, planned_faults
from tunesmith.train.run.agreed_stop import AgreedStop
from tunesmith.train.run.guards.bad_steps import losses_not_finite
from tunesmith.train.run.guards.guards import Guards
from tunesmith.train.run.guards.stragglers import BusyClock
from tunesmith.train.run.setup import Run, Session
from tunesmith.train.track.profile import Profiler


def optimizer_step(
    engine: Engine,
    objective: Objective,
    batches: list[Batch],
    vote: Callable[[], StepVote] = StepVote,
    *,
    busy: BusyClock,
    before_update: Callable[[], None],
) -> Step:
    """Forward and backward over every batch, then one update of the weights.

    The loss is a sum over the whole global batch divided by its denominator, so that it is the same for every split
    into ranks and micro batches. The vote is what this rank has to tell the others, asked for when its update is
    done: what reached it during the step counts in this step. busy is told what of the time is its own work;
    before_update is called once the gradients are there.
    """
    reach(Phase.meeting_at_step)
    here = (
        sum(objective.denominator(batch) for batch in batches),
        sum(batch.num_target_tokens for batch in batches),
        sum(batch.num_tokens for batch in batches),
    )
    counts = sum_over_ranks(numbers_on(engine.device, [float(count) for count in here]))
    model = engine.scorer.over(counts[0].float(), counts[2].float())
    loss = torch.zeros((), device=engine.device, dtype=torch.float64)
    losses: list[torch.Tensor] = []
    totals: dict[str, torch.Tensor] = {}
    extra_totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        with busy.forward():
            reach(Phase.forward)
            sums, extra = objective.sums(model, batch), model.extra_loss()
        whole = sums.loss + extra.loss if extra else sums.loss
        reach(Phase.backward)
        engine.backward(whole)
        losses.append(whole.detach())
        loss += sums.loss.detach()
        add_to(totals, sums.totals, engine.device)
        add_to(extra_totals, extra.totals if extra else {}, engine.device)
    reach(Phase.update)
    before_update()
    update = engine.step()
    row = numbers_on(engine.device, vote().row(engine.world))
    sums_here = torch.cat([torch.stack([loss, *totals.values(), *extra_totals.values()]), row])
    # The one place of a step that waits for the device.
    said = torch.cat([counts, update.norm[None], sum_over_ranks(sums_here)]).tolist()
    _, target_tokens, tokens, grad_norm, mean, *said = said
    applied = math.isfinite(grad_norm)
    busy.finish()
    of_objective, of_model = ({name: said.pop(0) for name in names} for names in (totals, extra_totals))
    return Step(
        loss=mean,
        grad_norm=grad_norm,
        applied=applied,
        tokens=int(tokens),
        target_tokens=int(target_tokens),
        consensus=StepConsensus.of(said),
        not_finite=() if applied else losses_not_finite(losses),
        metrics=(objective.metrics(of_objective) if totals else {}) | of_model,
    )


class Loop:
    """The run from a session's current step to its last: train, evaluate, save, keep the best weights."""

    def __init__(self, run: Run, session: Session) -> None:
        self.run = run
        self.session = session
        self.objective = run.objective
        self.guards = Guards(run, session)
        self.stop = AgreedStop(run, session)
        self._profiler = Profiler(run.config.profile, run.run_dir, run.world, run.device)
        session.engine.train()
        if progress.plan is not None:
            self.objective = planned_faults.install(progress.plan, run.objective, session.engine.module)

    def train(self) -> None:
        """Trains until the last step or until evaluate.metric has stopped getting better.

        Raises TrainingError; and Stopped, with the steps done saved, when a rank was asked to stop.
        """
        self.stop.begin()
        checkpoints = self.session.checkpoints
        try:
            self._train()
        except Stopped:
            if self.session.state.step > 0:
                self._save()
                checkpoints.settle()
            raise
        except TrainingError:  # what ends a run in the loop is found by all ranks alike: none of them is gone
            with contextlib.suppress(TrainingError):
                checkpoints.settle()
            raise

    def _train(self) -> None:
        state = self.session.state
        self.stop.end_if_asked()
        self._between_steps()  # a run that was stopped before it evaluated does so now
        while state.step < self.run.feed.total_steps and not self._out_of_patience():
            self.step()
        self._profiler.stop()
        if self.run.data.validation is not None and state.evaluated_step != state.step:
            self._evaluate()
        if self.run.config.checkpoint.at_end:
            self._save()
        self.session.checkpoints.settle()
        self.stop.end_if_asked()

    def step(self) -> Step | None:
        """One optimizer step, and the evaluation and the save that are due after it; None for one passed over.

        Raises TrainingError and RollBack; Stopped, when a rank was asked to stop. On all ranks alike.
        """
        step = None
        if self.session.state.step + 1 in self.session.state.passed_over:
            self._pass_over()
        else:
            step = self._optimizer_step()
        self._profiler.step(self.session.state.step)
        if step is not None and step.consensus.stop:
            raise self.stop.stopped()
        self._between_steps(step.consensus if step is not None else None)
        return step

    def close(self) -> None:
        """Lets go of the weights, so that another engine can be made in this process; nothing else may be called."""
        self.session.engine.close()
        del self.guards, self.objective
        if progress.plan is not None:
            progress.plan.weights = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _between_steps(self, consensus: StepConsensus | None = None) -> None:
        """Evaluation and save when due. consensus: what the ranks said in the step just done, if one was done."""
        state, config = self.session.state, self.run.config
        if consensus is not None:
            self.session.checkpoints.advance(consensus, state.step)
        evaluates = is_due(config.evaluate.every_steps, state.step) and state.evaluated_step != state.step
        saves = is_due(config.checkpoint.every_steps, state.step) or (consensus is not None and consensus.save)
        if evaluates:
            self._evaluate()
        if saves:
            self._save()
        if evaluates or saves:
            self.stop.end_if_asked()

    def _out_of_patience(self) -> bool:
        state, settings = self.session.state, self.run.config.evaluate
        if not settings.patience or state.evaluations_without_better < settings.patience:
            return False
        self.run.reporter.note(
            f"stopped early at step {state.step}: {settings.patience} evaluations without a better "
            f"{settings.metric.removeprefix('eval/').replace('_', ' ')}"
        )
        return True

    def _pass_over(self) -> None:
        """Counts a step that is not trained on since a roll-back. All ranks come here at the same step."""
        state = self.session.state
        state.step += 1
        state.skipped_steps += 1
        reach(Phase.reading_data, state.step)
        self.guards.bad_steps.passed_over(state.step)

    def _optimizer_step(self) -> Step:
        run, session, state = self.run, self.session, self.session.state
        started = time.monotonic()
        with self.guards.busy.working():
            reach(Phase.reading_data, state.step)
            batches = run.feed.batches(state.step)
        data_seconds = time.monotonic() - started
        learning_rate = run.config.optimizer.learning_rate * run.learning_rate_factor(state.step)
        session.engine.set_learning_rate(learning_rate)
        step = optimizer_step(
            session.engine,
            self.objective,
            batches,
            self._vote,
            busy=self.guards.busy,
            before_update=self.guards.before_update,
        )
        seconds = time.monotonic() - started
        state.count(step, seconds)
        run.reporter.step(
            state,
            step,
            learning_rate=learning_rate,
            epoch=run.feed.epoch_at(state.step),
            step_seconds=seconds,
            data_seconds=data_seconds,
        )
        self.stop.limit.count_step(seconds)
        self.guards.after_step(step, seconds)
        return step

    def _vote(self) -> StepVote:
        """What this rank has to tell the others at the end of this step."""
        every, done, saves = self.run.config.evaluate.every_steps, self.session.state.step + 1, self.session.checkpoints
        return StepVote(
            stop=self.stop.asked(another_step=True, evaluation_due=is_due(every, done) or is_due(every, done + 1)),
            save=saves.clock_says_save,
            unwritten=saves.unwritten,
            failed=saves.failed,
            busy_seconds=self.guards.busy.seconds,
        )

    def _evaluate(self) -> None:
        if self.run.data.validation is None:
            return
        state = self.session.state
        self.run.reporter.phase(Phase.evaluating, state.step)
        started = time.monotonic()
        metrics = best.measure(self.run, self.session, self.stop)
        self.stop.limit.count_evaluation(time.monotonic() - started)
        state.evaluated_step, state.evaluation = state.step, metrics
        self.run.reporter.evaluation(state.step, metrics)
        best.keep_if_better(self.run, self.session, metrics)

    def _save(self) -> None:
        checkpoints, state = self.session.checkpoints, self.session.state
        if checkpoints.saved_step == state.step:
            return
        self.run.reporter.phase(Phase.saving, state.step, words="saving a checkpoint")
        checkpoints.save(self.session.engine, state)
        self.stop.limit.count_save(checkpoints.save_seconds)


def is_due(every_steps: int | None, steps_done: int) -> bool:
    return bool(every_steps) and steps_done > 0 and steps_done % (every_steps or 1) == 0
