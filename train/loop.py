"""One optimizer step, and the loop around it."""

import math
import time
from pathlib import Path

import torch

from tunesmith.train import export
from tunesmith.train.ballot import Ballot, Verdict
from tunesmith.train.data.order import split_global_batch
from tunesmith.train.data.store import MicroBatch
from tunesmith.train.distributed import max_over_ranks, sum_over_ranks
from tunesmith.train.engine import Engine
from tunesmith.train.errors import TrainingError
from tunesmith.train.evaluate import evaluate
from tunesmith.train.profile import Profiler
from tunesmith.train.progress import reach, spoiled
from tunesmith.train.run_folder import best_folder
from tunesmith.train.setup import Run
from tunesmith.train.state import Step

NOTHING_TO_SAY = Ballot()


def optimizer_step(engine: Engine, micro_batches: list[MicroBatch], ballot: Ballot = NOTHING_TO_SAY) -> Step:
    """Forward and backward over every micro batch, then one update of the weights.

    The loss is a sum over the targets of the whole global batch divided by their summed weight, so that it is the
    same for every split into ranks and micro batches. The ballot is what this rank has to tell the others.
    """
    reach("meeting at a step")
    counts = sum_over_ranks(
        torch.tensor(
            [
                sum(batch.target_weight for batch in micro_batches),
                sum(batch.num_target_tokens for batch in micro_batches),
                sum(batch.num_tokens for batch in micro_batches),
                *ballot.row(engine.world),
            ],
            dtype=torch.float64,
        ).to(engine.device)
    )
    weight = counts[0].float()
    loss = torch.zeros((), device=engine.device, dtype=torch.float64)
    for batch in micro_batches:
        reach("forward")
        micro_loss = spoiled(engine.loss_sum(batch, divisor=weight))  # divided there: after it would be a rounding more
        reach("backward")
        engine.backward(micro_loss)
        loss += micro_loss.detach()
    reach("update")
    update = engine.step()
    mean, _, target_tokens, tokens, *said = torch.cat([sum_over_ranks(loss)[None], counts]).tolist()
    return Step(mean, update.grad_norm, update.applied, int(tokens), int(target_tokens), Verdict.of(said))


class Loop:
    """The run from its current step to its last: train, evaluate, save, keep the best weights."""

    def __init__(self, run: Run) -> None:
        self.run = run
        epochs = run.config.schedule.epochs
        self._samples = run.order.num_samples(epochs) if epochs else None

    def train(self) -> None:
        """Trains until the last step or until the eval loss has stopped falling. Raises TrainingError."""
        self.run.engine.train()
        profiler = Profiler(self.run.config.profile, self.run.run_dir, self.run.world, self.run.engine.device)
        self._between_steps()  # a run that was stopped before it evaluated does so now
        while self.run.state.step < self.run.total_steps and not self._out_of_patience():
            self._one_step()
            profiler.step(self.run.state.step)
            self._between_steps()
        profiler.stop()
        if self.run.data.validation is not None and self.run.state.evaluated_step != self.run.state.step:
            self._evaluate()
        if self.run.config.checkpoint.at_end:
            self._save()

    def _between_steps(self) -> None:
        state = self.run.state
        if self._due(self.run.config.evaluate.every_steps) and state.evaluated_step != state.step:
            self._evaluate()
        if self._due(self.run.config.checkpoint.every_steps):
            self._save()

    def _out_of_patience(self) -> bool:
        state, patience = self.run.state, self.run.config.evaluate.patience
        if not patience or state.evaluations_without_better < patience:
            return False
        self.run.reporter.note(f"stopped early at step {state.step}: {patience} evaluations without a better loss")
        return True

    def _due(self, every_steps: int | None) -> bool:
        return bool(every_steps) and self.run.state.step > 0 and self.run.state.step % (every_steps or 1) == 0

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of a step, counted from 0, on the device."""
        pad = self.run.tokenizer.pad_token_id
        ids = self.run.order.global_batch(step, self._samples)
        split = split_global_batch(
            ids,
            self.run.data.train.lengths,
            micro_batch_size=self.run.config.batch.micro_batch_size,
            rank=self.run.world.rank,
            world_size=self.run.world.world_size,
        )
        return [self.run.data.train.micro_batch(part, pad_token_id=pad).to(self.run.engine.device) for part in split]

    def _one_step(self) -> None:
        started = time.monotonic()
        reach("reading data", self.run.state.step)
        micro_batches = self.micro_batches(self.run.state.step)
        data_seconds = time.monotonic() - started
        learning_rate = self.run.config.optimizer.learning_rate * self.run.learning_rate_factor(self.run.state.step)
        self.run.engine.set_learning_rate(learning_rate)
        step = optimizer_step(self.run.engine, micro_batches, self._ballot())
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
        self._check_skips(step)

    def _ballot(self) -> Ballot:
        """What this rank has to tell the others at this step."""
        return Ballot()

    def _count(self, step: Step, seconds: float) -> None:
        state = self.run.state
        state.step += 1
        state.tokens_seen += step.tokens
        state.target_tokens_seen += step.target_tokens
        state.train_seconds += seconds
        state.skipped_in_row = 0 if step.applied else state.skipped_in_row + 1
        state.skipped_steps += not step.applied
        state.train_loss = step.loss

    def _check_skips(self, step: Step) -> None:
        if step.applied:
            return
        self.run.reporter.warn(
            f"step {self.run.state.step}: loss {step.loss}, gradient norm {step.grad_norm}: not finite, so the weights "
            f"were left as they are ({self.run.state.skipped_in_row} in a row)"
        )
        limit = self.run.config.optimizer.max_skipped_steps
        if self.run.state.skipped_in_row >= limit:
            raise TrainingError(
                f"{limit} steps in a row had a loss or gradient that is not finite.",
                at=f"step {self.run.state.step}",
                do="lower optimizer.learning_rate, use engine.precision=bf16 instead of fp16, or look at the data of "
                "these steps; optimizer.max_skipped_steps sets the limit.",
            )

    def measure(self) -> dict[str, float]:
        """The figures of the validation split."""
        assert self.run.data.validation is not None
        return evaluate(
            self.run.engine,
            self.run.data.validation,
            batch_size=self.run.config.evaluate.batch_size,
            world=self.run.world,
            pad_token_id=self.run.tokenizer.pad_token_id,
        )

    def _evaluate(self) -> None:
        if self.run.data.validation is None:
            return
        self.run.reporter.phase("evaluating")
        reach("evaluating")
        metrics = self.measure()
        self.run.state.evaluated_step, self.run.state.evaluation = self.run.state.step, metrics
        self.run.reporter.evaluation(self.run.state.step, metrics)
        self._note_best(metrics["eval/loss"])

    def _note_best(self, loss: float) -> None:
        state = self.run.state
        if not loss < (math.inf if state.best_eval_loss is None else state.best_eval_loss):
            state.evaluations_without_better += 1
            return
        state.evaluations_without_better = 0
        state.best_step, state.best_eval_loss = state.step, loss
        self.write_model()

    def write_model(self) -> Path:
        """Writes the live weights as the run's best so far. Every rank calls it."""
        self.run.reporter.phase("writing the model")
        reach("writing the model")
        folder = best_folder(self.run.run_dir, self.run.state.step)
        export.write(self.run.engine, self.run.tokenizer, self.run.config, folder)
        if self.run.world.rank == 0:
            export.remove_others(folder)
        return folder

    def _save(self) -> None:
        if self.run.state.step in self.run.checkpoints.steps():
            return
        self.run.reporter.phase("saving a checkpoint")
        reach("saving")
        started = time.monotonic()
        self.run.checkpoints.save(self.run.engine, self.run.state)
        self.run.reporter.saved(self.run.state.step, max_over_ranks(time.monotonic() - started, self.run.engine.device))
