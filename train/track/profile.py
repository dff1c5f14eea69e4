"""A torch.profiler trace of some steps of rank 0."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tunesmith.train.config.config import ProfileConfig
from tunesmith.train.ranks.distributed import World


class Profiler:
    """Records steps start_step to start_step + num_steps - 1 (counted from 1) into <run>/profile/trace.json."""

    def __init__(self, settings: ProfileConfig, run_dir: Path, world: World, device: torch.device) -> None:
        self._wanted = settings.start_step is not None and world.rank == 0
        self._first = settings.start_step or 0
        self._last = self._first + settings.num_steps - 1
        self._folder = run_dir / "profile"
        self._activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._running: profile | None = None

    def step(self, steps_done: int) -> None:
        """Called after every optimizer step."""
        if not self._wanted:
            return
        if self._running is None and steps_done == self._first - 1:
            self._running = profile(activities=self._activities, profile_memory=True)
            self._running.start()
        elif steps_done >= self._last:
            self.stop()

    def stop(self) -> None:
        """Ends the recording, if one runs, and writes the trace and a table of the costliest operations."""
        if self._running is None:
            return
        self._running.stop()
        self._folder.mkdir(exist_ok=True)
        self._running.export_chrome_trace(str(self._folder / "trace.json"))
        table = self._running.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        (self._folder / "operations.txt").write_text(table, encoding="utf-8")
        self._running, self._wanted = None, False
