"""Ranks that are slower than the others: their own work timed at each step, and the slow one named."""

import math
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from tunesmith.train.ranks.distributed import gather_floats

WINDOW = 16  # steps whose median counts
RATIO = 1.5  # to the median of the others, from which on a rank is slow
WELL_RATIO = 1.25  # below it a slow rank has become well, and may be named again
LEAST_SHARE = 0.05  # of a step that the delay must take: less would not be noticed
LEAST_SECONDS = 0.02
# The delay must stand out of its own noise: be there in 15 of the 16 steps, and be that many times its standard error;
# somewhat more among many ranks, where chance has more tries. Two equal ranks whose times vary by half from step to
# step (log-normal, sigma 0.5) have medians 1.5 apart three times in a hundred.
LEAST_STEPS = 15
LEAST_ERRORS = 5.0
MAX_HOST = 64  # bytes of a host's name


class BusyClock:
    """How long this rank has itself worked in a step, without waiting for others.

    That is reading data and the forwards: by the host's clock on CPUs, by events in the stream on a GPU (read after the
    step has waited for the GPU anyway). The backward is left out: its collectives wait for the slowest rank, and then
    all look slow alike. Under ZeRO 3 the forward gathers weights from all ranks and is left out too: only a rank whose
    host or data is slow is found there, not one whose GPU is.
    """

    def __init__(self, device: torch.device, *, forward_waits: bool) -> None:
        self.seconds = 0.0  # of the last step that was finished
        self._cuda = device.type == "cuda"
        self._forward_waits = forward_waits
        self._running = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around what the host does by itself."""
        started = time.monotonic()
        yield
        self._running += time.monotonic() - started

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward."""
        if self._forward_waits:
            yield
        elif self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            with self.working():
                yield

    def finish(self) -> None:
        """Ends a step, after the device has done its work."""
        gpu = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self.seconds, self._running = self._running + gpu, 0.0
        self._events.clear()


@dataclass
class Stragglers:
    """Watches the ranks' busy seconds."""

    hosts: list[str]  # of each rank
    _steps: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=WINDOW), repr=False)  # busy seconds, [ranks]
    _slow: set[int] = field(default_factory=set, repr=False)

    def add(self, busy_seconds: tuple[float, ...], step_seconds: float) -> list[str]:
        """One step of all ranks; a sentence for each rank that has just become slow."""
        self._steps.append(np.array(busy_seconds))
        if len(self.hosts) < 2 or len(self._steps) < WINDOW:
            return []
        times = np.stack(self._steps)
        own = np.median(times, axis=0)
        others = median_of_others(own)
        delay = own - others
        well = (own < WELL_RATIO * others) | (delay < LEAST_SECONDS / 2)
        self._slow -= set(np.flatnonzero(well).tolist())
        slow = (own > RATIO * others) & (delay > max(LEAST_SHARE * step_seconds, LEAST_SECONDS))
        found = []
        for rank in set(np.flatnonzero(slow).tolist()) - self._slow:
            if not self._is_sure(times[:, rank] - np.median(np.delete(times, rank, axis=1), axis=1)):
                continue
            self._slow.add(rank)
            found.append(
                f"rank {rank} ({self.hosts[rank]}) is slow: {own[rank]:.2g} s of its own work a step against "
                f"{others[rank]:.2g} s on the other ranks, over the last {WINDOW} steps; all wait for it"
            )
        return found

    def _is_sure(self, delays: np.ndarray) -> bool:
        """Whether the delays of a rank, [steps], are more than noise."""
        standard_error = float(delays.std(ddof=1)) / math.sqrt(len(delays))
        least = (LEAST_ERRORS + 0.3 * math.log2(len(self.hosts))) * standard_error
        return int(np.count_nonzero(delays > 0)) >= LEAST_STEPS and float(delays.mean()) > least


def median_of_others(values: np.ndarray) -> np.ndarray:
    """For each of at least two values the median of the rest, in one sort: there may be a thousand ranks."""
    order = np.argsort(values, kind="stable")
    ordered, position = values[order], np.empty(len(values), dtype=np.int64)
    position[order] = np.arange(len(values))

    def rest(index: int) -> np.ndarray:
        """The index-th smallest of the others."""
        return np.where(position <= index, ordered[min(index + 1, len(values) - 1)], ordered[index])

    num_others = len(values) - 1
    return (rest((num_others - 1) // 2) + rest(num_others // 2)) / 2


def host_names(device: torch.device) -> list[str]:
    """The host of each rank. Every rank calls it; as numbers, not pickled."""
    name = socket.gethostname().encode()[:MAX_HOST].ljust(MAX_HOST)
    rows = gather_floats(torch.tensor([list(name)], dtype=torch.float64, device=device))
    return [bytes(int(byte) for byte in row).decode(errors="replace").strip() for row in rows.tolist()]
