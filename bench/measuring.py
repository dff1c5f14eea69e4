"""Trainings that take turns in one process, their rates, memory and the machine they ran on."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

StepDone = Callable[[float, int], None]  # loss, target tokens
Training = Callable[[StepDone], None]


@dataclass(frozen=True)
class Sample:
    """One turn of one contestant."""

    seconds: float
    cpu_seconds: float  # of all threads; says how far other processes disturbed the wall time
    target_tokens: int
    losses: list[float]

    @property
    def rate(self) -> float:
        return self.target_tokens / self.seconds


class Stopped(BaseException):
    """Ends a training between two steps; nothing that catches errors catches it."""


class Contestant:
    """A training in a thread of its own that stands still between its turns."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._steps_left = 0
        self._steps: list[tuple[float, int]] = []
        self._error: BaseException | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._training(self._step_done)
        except BaseException as error:
            self._error = error
        self._paused.release()

    def _step_done(self, loss: float, target_tokens: int) -> None:
        self._steps.append((loss, target_tokens))
        self._steps_left -= 1
        if self._steps_left == 0:
            self._paused.release()
            self._go.acquire()
        if self._is_stopped:
            raise Stopped

    def stop(self) -> None:
        """Ends the training where it stands."""
        self._is_stopped = True
        self._go.release()
        self._thread.join()

    def turn(self, num_steps: int) -> Sample:
        """Goes on for some steps. Raises what the training raised."""
        self._steps_left, self._steps = num_steps, []
        started, cpu_started = time.perf_counter(), time.process_time()
        self._go.release()
        self._paused.acquire()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        if self._error is not None:
            raise self._error
        assert len(self._steps) == num_steps
        return Sample(seconds, cpu_seconds, sum(count for _, count in self._steps), [loss for loss, _ in self._steps])


def on_the_cpu() -> None:
    """For this process and those it starts; before torch is imported."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
    )  # fmt: skip
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def ratios(ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict[str, Any]:
    """Our rate over another's, round by round; and the median of the same over processor seconds."""
    pairs = list(zip(ours, theirs, strict=True))
    found = [one.rate / other.rate for one, other in pairs]
    per_cpu_second = [
        one.target_tokens / one.cpu_seconds / (other.target_tokens / other.cpu_seconds) for one, other in pairs
    ]
    return {
        "median": statistics.median(found),
        "min": min(found),
        "max": max(found),
        "rounds": found,
        "cpu_median": statistics.median(per_cpu_second),
    }


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, cores and versions; nothing that tells whose machine it is."""
    import torch

    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }
