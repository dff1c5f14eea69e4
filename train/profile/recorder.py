"""When a step is recorded, and what becomes of the recording. A step that is not costs a comparison of numbers."""

import contextlib
import gc
import gzip
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tunesmith.train.config.config import AdapterKind, Config, ProfileConfig
from tunesmith.train.data.store import Batch
from tunesmith.train.errors import ConfigError
from tunesmith.train.files.durable import write_atomically
from tunesmith.train.profile.advice import advise
from tunesmith.train.profile.analysis import Profile, analyse
from tunesmith.train.profile.breakdown import PARTS, Breakdown, break_down, rank_times, row_of
from tunesmith.train.profile.ceilings import measure
from tunesmith.train.profile.costs import Known
from tunesmith.train.profile.page import render
from tunesmith.train.profile.ranges import Ranges
from tunesmith.train.profile.trace import Trace, read_trace
from tunesmith.train.ranks.distributed import World, gather_floats
from tunesmith.train.track.reporter import Reporter

PAGE, TRACE = "profile.html", "trace.json.gz"
LEVEL = 5  # of gzip: nearly as small as 9 in a third of the time


def check_steps(settings: ProfileConfig, total_steps: int) -> None:
    """Raises ConfigError where the run is over before the page's last step."""
    if settings.start_step is not None and settings.start_step + settings.num_steps - 1 > total_steps:
        raise ConfigError(
            f"the profile is of steps {settings.start_step} to {settings.start_step + settings.num_steps - 1}, and the "
            f"run has {total_steps}.",
            key="profile.start_step",
            do="set profile.start_step=2 profile.num_steps=1, or train for more steps.",
        )


def check(settings: ProfileConfig, device: torch.device) -> None:
    """Raises ConfigError where the device has no NVTX."""
    if settings.nvtx and device.type != "cuda":
        raise ConfigError(
            "profile.nvtx is for nsys, which records GPUs, and this run is on a CPU.",
            key="profile.nvtx",
            do="choose profile=on, which works on any device.",
        )


class Recording(Protocol):
    """Of some steps, one after another."""

    ranges: Ranges
    started: bool

    def start(self) -> None: ...

    def stop(self) -> None: ...


class TorchRecording:
    """By torch.profiler. whole: with shapes and memory, which the page needs and the figures do not."""

    def __init__(self, device: torch.device, *, whole: bool, stacks: bool = False) -> None:
        self.on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.on_gpu else [])
        self._profile = profile(activities=activities, record_shapes=whole, profile_memory=whole, with_stack=stacks)
        self.ranges, self.started = Ranges(record_function), False
        self._profile.prepare_trace()

    def start(self) -> None:
        self._profile.start_trace()
        self.started = True

    def stop(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self._profile.stop_trace()

    def content(self) -> bytes:
        """The trace in Chrome's format."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return path.read_bytes()


class NvtxRecording:
    """By nsys, which was started around this process: it records while told to."""

    def __init__(self) -> None:
        self.ranges, self.started = Ranges(torch.cuda.nvtx.range), False

    def start(self) -> None:
        torch.cuda.cudart().cudaProfilerStart()
        self.started = True

    def stop(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """While a trace's events are made, Python would look through all that a training holds, again and again.

    It was two thirds of what a sample cost.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Profiler:
    """Records the steps that config.profile names. All ranks record: each writes its trace down as a few numbers.

    Args:
        held: bytes on the device that outlive a step, by what they are for.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        world: World,
        device: torch.device,
        reporter: Reporter,
        held: Callable[[], dict[str, int]],
    ) -> None:
        self._config, self._settings = config, config.profile
        self._folder = run_dir / "profile"
        self._world, self._device, self._reporter, self._held = world, device, reporter, held
        start = self._settings.start_step
        self._page = range(start, start + self._settings.num_steps) if start is not None else range(0)
        self._recording: Recording | None = None
        self._steps = range(0)  # that are being recorded
        self._before: dict[str, int] = {}
        self._positions = self._tokens = self._pairs = self._num_batches = 0
        self._plain: deque[float] = deque(maxlen=5)  # seconds of steps that were not recorded, before the page's
        self._began = 0.0
        self.is_done = False  # the steps of the page have been recorded

    def before_step(self, steps_done: int) -> None:
        """Called before each optimizer step, outside of what is timed."""
        step = steps_done + 1
        if step < self._page.start - 1:
            self._began = time.monotonic()
        if self._recording is None and (steps := self._due(step)):
            self._prepare(whole=steps == self._page)
            self._steps = steps
        if self._recording is None or step < self._steps.start:
            return
        if step == self._steps.start:
            self._before = self._held() if self._steps == self._page else {}
            self._positions = self._tokens = self._pairs = self._num_batches = 0
            self._recording.start()
        self._recording.ranges.begin_step(step)

    def after_step(self, steps_done: int) -> None:
        """Called after each optimizer step, on all ranks alike."""
        if steps_done < self._page.start - 1 and self._recording is None:
            self._plain.append(time.monotonic() - self._began)
        if self._recording is None or steps_done < self._steps.start:
            return
        self._recording.ranges.end_step()
        if steps_done < self._steps[-1]:
            return
        recording, self._recording = self._recording, None
        recording.stop()
        if isinstance(recording, TorchRecording):
            self._evaluate(recording, steps_done)
        self.is_done = self.is_done or self._steps == self._page

    def read(self, batches: list[Batch]) -> None:
        """What a step has of data."""
        if self._recording is not None:
            self._positions += sum(batch.labels.numel() for batch in batches)
            self._tokens += sum(batch.num_tokens for batch in batches)
            self._pairs += sum(length * (length + 1) // 2 for batch in batches for length in batch.segments.lengths)
            self._num_batches += len(batches)

    def close(self) -> None:
        """Drops a recording whose steps will not all come."""
        if self._recording is not None:
            recording, self._recording = self._recording, None
            recording.ranges.end_step()
            if not recording.started:
                recording.start()  # as torch.profiler leaves its own warm-up
            recording.stop()

    def _due(self, step: int) -> range:
        """The steps of a recording that begins now: with this step, or after it, which then warms it up."""
        if self._page and step in (self._page.start - 1, self._page.start):
            return self._page
        every = self._settings.every_steps
        return range(step, step + 1) if every and step % every == 0 else range(0)

    def _prepare(self, *, whole: bool) -> None:
        if self._settings.nvtx:
            self._recording = NvtxRecording()
        else:
            self._recording = TorchRecording(self._device, whole=whole, stacks=whole and self._settings.stacks)

    @collector_paused()
    def _evaluate(self, recording: TorchRecording, step: int) -> None:
        content = recording.content()
        is_page = self._steps == self._page
        events = orjson.loads(content)["traceEvents"]
        trace = read_trace(events, on_gpu=recording.on_gpu, whole=is_page and self._world.rank == 0)
        breakdown = break_down(trace)
        rows = gather_floats(torch.tensor([row_of(breakdown)], dtype=torch.float64, device=self._device)).tolist()
        if not is_page:
            self._reporter.profiled(step, sample_metrics(rows))
        elif self._world.rank == 0:
            self._write(content, trace, breakdown, rows)

    def _write(self, content: bytes, trace: Trace, breakdown: Breakdown, rows: list[list[float]]) -> None:
        known = Known(self._pairs / max(1, self._num_batches), self._config.adapter.kind is AdapterKind.none)
        made = Profile(
            self._config.name,
            (self._steps[0], self._steps[-1]),
            analyse(trace, breakdown, self._before, known),
            measure(self._device, self._config.engine.precision),
            rank_times(rows),
            max(0.0, breakdown.step - statistics.median(self._plain)) if self._plain else None,
        )
        advice = advise(made, self._config, self._tokens / max(1, self._positions))
        page = self._folder / PAGE
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / TRACE, gzip.compress(content, LEVEL))
            write_atomically(page, render(made, advice).encode())
        except OSError as error:
            self._reporter.warn(f"the profile cannot be written ({error}); training goes on.")
            return
        self._reporter.note(f"profile of steps {made.steps[0]} to {made.steps[1]}: {page}")
        for line in [f"{item.gain:.2f}x  {item.do}: {item.why}" for item in advice] or ["no setting promises 2 %"]:
            self._reporter.note(f"  {line}")


def sample_metrics(rows: list[list[float]]) -> dict[str, float]:
    """Shares of the step, as means over the ranks."""
    ranks = rank_times(rows)
    whole = sum(sum(rank.parts.values()) for rank in ranks)
    shares: dict[str, Any] = {part: sum(rank.parts[part] for rank in ranks) / whole for part in PARTS}
    shares["rank wait"] = sum(rank.waits for rank in ranks) / whole
    return {f"profile/{name.replace(' ', '_')}_fraction": value for name, value in shares.items()}
