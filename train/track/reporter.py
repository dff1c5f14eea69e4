"""What rank 0 tells: the screen, the tracker and the run's files. On other ranks only phase() does anything."""

import resource
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType

from tunesmith.train.config.config import Config
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.ranks.state import RunState, Step
from tunesmith.train.track.console import Console
from tunesmith.train.track.metrics import Throughput
from tunesmith.train.track.track import Sample, Tracker


class Reporter:
    """Turns what the loop does into lines, rows and tables."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.throughput: Throughput | None = None
        self._tracker: Tracker | None = None
        self._every_steps = 1
        self._total_steps = 0
        self.wandb_place: str | None = None  # where the run is in W&B, once it has ended

    def begin(
        self,
        config: Config,
        resolved: dict[str, Any],
        run_dir: Path,
        throughput: Throughput,
        total_steps: int,
        step: int,
    ) -> None:
        """Opens the run's files and the live line; step is the one the run goes on from."""
        if self.console is None:
            return
        self.throughput = throughput
        self._every_steps = config.track.every_steps
        self._total_steps = total_steps
        self._tracker = Tracker(config, run_dir, resolved=resolved, resume_step=step, warn=self.console.warn)
        self._tracker.plan(total_steps)
        self.console.begin(total_steps, step)

    def go_back(self, step: int, throughput: Throughput) -> None:
        """The run goes on from an earlier step: the rows after it are dropped from the run's files."""
        if self._tracker is not None:
            self.throughput = throughput
            self._tracker.go_back(step)

    def step(
        self,
        state: RunState,
        step: Step,
        *,
        learning_rate: float,
        epoch: float,
        step_seconds: float,
        data_seconds: float,
    ) -> None:
        if self.console is None or self._tracker is None or self.throughput is None:
            return
        self.throughput.add(step_seconds, step.tokens, step.target_tokens, data_seconds=data_seconds)
        metrics: dict[str, float | None] = {
            "train/loss": step.loss,
            "train/grad_norm": step.grad_norm,
            "train/learning_rate": learning_rate,
            "train/epoch": epoch,
            "train/tokens_seen": state.tokens_seen,
            "train/target_tokens_seen": state.target_tokens_seen,
            "train/skipped_steps": state.skipped_steps,
            "throughput/step_seconds": step_seconds,
            "throughput/data_seconds": data_seconds,
            "memory/peak_memory_gib": self.peak_memory_gib,
            **{f"train/{name}": value for name, value in step.metrics.items()},
            **self.throughput.metrics(),
        }
        if state.step % self._every_steps == 0 or state.step == self._total_steps:
            self._tracker.log(state.step, metrics)
        self.console.step(state.step, metrics, epoch=epoch)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        if self.console is not None and self._tracker is not None:
            self._tracker.log(step, dict(metrics))
            self.console.evaluation(step, metrics)

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self._tracker is not None:
            self._tracker.samples(step, samples)

    def saved(self, step: int, *, save_seconds: float, stall_seconds: float) -> None:
        """A checkpoint was published: how long that took in all, and what the step loop has lost to it."""
        if self._tracker is not None:
            metrics = {"checkpoint/save_seconds": save_seconds, "checkpoint/stall_seconds": stall_seconds}
            self._tracker.log(step, metrics)

    def profiled(self, step: int, metrics: dict[str, float]) -> None:
        """A recorded step's figures."""
        if self._tracker is not None:
            self._tracker.log(step, dict(metrics))

    def phase(self, phase: Phase, step: int | None = None, *, words: str = "") -> None:
        """Every rank reaches the phase, and rank 0 shows it: in other words where some are given."""
        reach(phase, step)
        if self.console is not None:
            self.console.phase(words or phase)

    def note(self, text: RenderableType) -> None:
        if self.console is not None:
            self.console.print(text)

    def warn(self, text: str) -> None:
        if self.console is not None:
            self.console.warn(text)

    def table(self, rows: list[tuple[str, str]], title: str) -> None:
        if self.console is not None:
            self.console.start_summary(rows, title)

    def finish(self, summary: dict[str, Any], *, exit_code: int = 0) -> None:
        """Closes the tracker with the run's summary."""
        tracker, self._tracker = self._tracker, None  # first: an interrupt while it waits must not finish it twice
        if tracker is not None:
            tracker.finish(summary, exit_code=exit_code)
            self.wandb_place = tracker.wandb_place

    def end(self, rows: list[tuple[str, str]], title: str) -> None:
        if self.console is not None:
            self.console.end(rows, title)

    def close(self) -> None:
        if self.console is not None:
            self.console.close()

    @property
    def peak_memory_gib(self) -> float:
        """Peak of this rank in GiB: of the GPU where there is one, else resident host memory."""
        if torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
