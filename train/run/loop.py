"""One optimizer step, and the loop around it."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tunesmith.train.answer import export
from tunesmith.train.answer.evaluate import evaluate
from tunesmith.train.data.store import MicroBatch
from tunesmith.train.engine import Engine
from tunesmith.train.errors import Stopped, TrainingError
from tunesmith.train.files.run_folder import best_folder
from tunesmith.train.ranks.distributed import sum_over_ranks
from tunesmith.train.ranks.progress import reach, spoiled
from tunesmith.train.ranks.state import Step
from tunesmith.train.ranks.step_vote import Ballot, Verdict
from tunesmith.train.run.agreed_stop import AgreedStop
from tunesmith.train.run.guards.bad_steps import losses_not_finite
from tunesmith.train.run.guards.guards import Guards
from tunesmith.train.run.guards.stragglers import BusyClock
from tunesmith.train.run.setup import Run
from tunesmith.train.track.profile import Profiler


def optimizer_step(
    engine: Engine,
    micro_batches: list[MicroBatch],
    ballot: Callable[[], Ballot] = Ballot,
    *,
    busy: BusyClock,
    before_update: Callable[[], None],
) -> Step:
    """Forward and backward over every micro batch, then one update of the weights.

    The loss is a sum over the targets of the whole global batch divided by their summed weight, so that it is the
    same for every split into ranks and micro batches. The ballot is what this rank has to tell the others,
    asked for when its update is done: what reached it during the step counts in this step. busy is told
    what of the time is its own work; before_update is called once the gradients are there.
    """
    reach("meeting at a step")
    counts = sum_over_ranks(
        torch.tensor(
            [
                sum(batch.target_weight for batch in micro_batches),
                sum(batch.num_target_tokens for batch in micro_batches),
                sum(batch.num_tokens for batch in micro_batches),
            ],
            dtype=torch.float64,
        ).to(engine.device)
    )
    weight = counts[0].float()
    loss = torch.zeros((), device=engine.device, dtype=torch.float64)
    micro_losses: list[torch.Tensor] = []
    for batch in micro_batches:
        with busy.forward():
            reach("forward")
            micro_loss = spoiled(engine.loss_sum(batch, divisor=weight))  # divided there: it rounds once less
        reach("backward")
        engine.backward(micro_loss)
        micro_losses.append(micro_loss.detach())
        loss += micro_losses[-1]
    reach("update")
    before_update()
    update = engine.step()
    row = torch.tensor(ballot().row(engine.world), dtype=torch.float64).to(engine.device)
    sums = sum_over_ranks(torch.cat([loss[None], row]))
    _, target_tokens, tokens, mean, *said = torch.cat([counts, sums]).tolist()
    busy.finish()
    not_finite = () if update.applied else losses_not_finite(micro_losses)
    return Step(mean, update.grad_norm, update.applied, int(tokens), int(target_tokens), Verdict.of(said), not_finite)


class Loop:
    """The run from its current step to its last: train, evaluate, save, keep the best weights."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._guards = Guards(run)
        self._stop = AgreedStop(run)

    def train(self) -> None:
        """Trains until the last step or until the eval loss has stopped falling.

        Raises TrainingError; and Stopped, with the steps done saved, when a rank was asked to stop.
        """
        self._stop.begin()
        try:
            self._train()
        except Stopped:
            if self.run.state.step > 0:
                self._save()
                self.run.checkpoints.settle()
            raise
        except TrainingError:  # what ends a run in the loop is found by all ranks alike: none of them is gone
            with contextlib.suppress(TrainingError):
                self.run.checkpoints.settle()
            raise

    def _train(self) -> None:
        self.run.engine.train()
        profiler = Profiler(self.run.config.profile, self.run.run_dir, self.run.world, self.run.engine.device)
        self.end_if_asked()
        self._between_steps()  # a run that was stopped before it evaluated does so now
        while self.run.state.step < self.run.total_steps and not self._out_of_patience():
            step = self._one_step()
            profiler.step(self.run.state.step)
            if step is not None and step.verdict.stop:
                raise self._stop.stopped()
            self._between_steps(step.verdict if step is not None else None)
        profiler.stop()
        if self.run.data.validation is not None and self.run.state.evaluated_step != self.run.state.step:
            self._evaluate()
        if self.run.config.checkpoint.at_end:
            self._save()
        self.run.checkpoints.settle()
        self.end_if_asked()

    def end_if_asked(self) -> None:
        """Raises Stopped on all ranks when one of them was asked to stop. Every rank calls it."""
        self._stop.end_if_asked()

    def _between_steps(self, verdict: Verdict | None = None) -> None:
        """Evaluation and save when due. verdict: what the ranks said in the step just done, if one was done."""
        state = self.run.state
        if verdict is not None:
            self.run.checkpoints.advance(verdict, state.step)
        evaluates = self._due(self.run.config.evaluate.every_steps) and state.evaluated_step != state.step
        saves = self._due(self.run.config.checkpoint.every_steps) or (verdict is not None and verdict.save)
        if evaluates:
            self._evaluate()
        if saves:
            self._save()
        if evaluates or saves:
            self.end_if_asked()

    def _out_of_patience(self) -> bool:
        state, patience = self.run.state, self.run.config.evaluate.patience
        if not patience or state.evaluations_without_better < patience:
            return False
        self.run.reporter.note(f"stopped early at step {state.step}: {patience} evaluations without a better loss")
        return True

    def _due(self, every_steps: int | None, step: int | None = None) -> bool:
        done = self.run.state.step if step is None else step
        return bool(every_steps) and done > 0 and done % (every_steps or 1) == 0

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of a step, counted from 0, on the device."""
        pad = self.run.tokenizer.pad_token_id
        split = self._guards.sequences(step, self.run.world.rank)
        return [self.run.data.train.micro_batch(part, pad_token_id=pad).to(self.run.engine.device) for part in split]

    def _one_step(self) -> Step | None:
        if self._guards.passes_over_next():
            return None
        started = time.monotonic()
        with self._guards.busy.working():
            reach("reading data", self.run.state.step)
            micro_batches = self.micro_batches(self.run.state.step)
        data_seconds = time.monotonic() - started
        learning_rate = self.run.config.optimizer.learning_rate * self.run.learning_rate_factor(self.run.state.step)
        self.run.engine.set_learning_rate(learning_rate)
        step = optimizer_step(
            self.run.engine,
            micro_batches,
            self._ballot,
            busy=self._guards.busy,
            before_update=self._guards.before_update,
        )
        seconds = time.monotonic() - started
        self._count(step, seconds)
        self.run.reporter.step(
            self.run.state,
            step,
            learning_rate=learning_rate,
            epoch=self.run.order.epoch_at(self.run.state.step),
            step_seconds=seconds,
            data_seconds=data_seconds,
        )
        self._stop.limit.count_step(seconds)
        self._guards.after_step(step, seconds)
        return step

    def _ballot(self) -> Ballot:
        """What this rank has to tell the others at the end of this step."""
        every, done = self.run.config.evaluate.every_steps, self.run.state.step + 1
        evaluation_due = self._due(every, done) or self._due(every, done + 1)
        stop = self._stop.asked(another_step=True, evaluation_due=evaluation_due)
        saves = self.run.checkpoints
        return Ballot(
            stop=stop,
            save=saves.clock_says_save,
            unwritten=saves.unwritten,
            failed=saves.failed,
            busy_seconds=self._guards.busy.seconds,
        )

    def _count(self, step: Step, seconds: float) -> None:
        state = self.run.state
        state.step += 1
        state.tokens_seen += step.tokens
        state.target_tokens_seen += step.target_tokens
        state.train_seconds += seconds
        state.skipped_in_row = 0 if step.applied else state.skipped_in_row + 1
        state.skipped_steps += not step.applied
        state.train_loss = step.loss

    def measure(self) -> dict[str, float]:
        """The figures of the validation split."""
        assert self.run.data.validation is not None
        return evaluate(
            self.run.engine,
            self.run.data.validation,
            batch_size=self.run.config.evaluate.batch_size,
            world=self.run.world,
            pad_token_id=self.run.tokenizer.pad_token_id,
            before_batch=self.end_if_asked,
        )

    def _evaluate(self) -> None:
        if self.run.data.validation is None:
            return
        self.run.reporter.phase("evaluating")
        reach("evaluating", self.run.state.step)
        started = time.monotonic()
        metrics = self.measure()
        self._stop.limit.count_evaluation(time.monotonic() - started)
        self.run.state.evaluated_step, self.run.state.evaluation = self.run.state.step, metrics
        self.run.reporter.evaluation(self.run.state.step, metrics)
        self._note_best(metrics["eval/loss"])

    def _note_best(self, loss: float) -> None:
        state = self.run.state
        if not loss < (math.inf if state.best_eval_loss is None else state.best_eval_loss):
            state.evaluations_without_better += 1
            return
        state.evaluations_without_better = 0
        try:
            self.write_model()
        except TrainingError as error:  # on all ranks alike
            older = "there are no older best weights" if state.best_step is None else f"step {state.best_step} stays it"
            self.run.reporter.warn(f"step {state.step}: the best so far, but {error.what} {older}; training goes on")
            return
        state.best_step, state.best_eval_loss = state.step, loss

    def write_model(self) -> Path:
        """Writes the live weights as the run's best so far. Every rank calls it. Raises TrainingError on all ranks."""
        self.run.reporter.phase("writing the model")
        reach("writing the model", self.run.state.step)
        folder = best_folder(self.run.run_dir, self.run.state.step)
        export.write(self.run.engine, self.run.tokenizer, self.run.config, folder)
        if self.run.world.rank == 0:
            export.remove_others(folder)
        return folder

    def _save(self) -> None:
        if self.run.checkpoints.saved_step == self.run.state.step:
            return
        self.run.reporter.phase("saving a checkpoint")
        reach("saving", self.run.state.step)
        self.run.checkpoints.save(self.run.engine, self.run.state)
        self._stop.limit.count_save(self.run.checkpoints.save_seconds)
