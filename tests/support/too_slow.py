"""A default test has five seconds: what takes longer fails, and belongs to `make test-slow`.

They are seconds of a machine of its own: the time in which processes waited for a core does not count, as long as none
of the test's own has computed for longer; nor does the set-up of fixtures, which many tests share.
"""

import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic  # bound here: tests put other clocks into the module

import psutil
import pytest

LIMIT_SECONDS = 5.0
MAY_TAKE_LONGER = ("cold", "slow", "torture", "cluster", "gpu")
PRESSURE = Path("/proc/pressure/cpu")  # Linux: "some avg10=0.00 avg60=0.00 avg300=0.00 total=<microseconds>"


@dataclass(frozen=True)
class Usage:
    at: float
    waited: float  # seconds in which some process of the machine waited for a core, since it was started
    computed: dict[int, float]  # seconds of a core that this process and each of its children has had

    @classmethod
    def now(cls) -> "Usage":
        waited, computed = 0.0, {}
        if PRESSURE.exists():
            waited = int(PRESSURE.read_text().split("total=")[1].split()[0]) / 1e6
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                computed[process.pid] = sum(process.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return cls(monotonic(), waited, computed)

    def seconds_alone(self, seconds: float, before: "Usage") -> float:
        """What so many seconds until now would have been on a machine of its own, at least."""
        crowded = max(0.0, 1 - (os.cpu_count() or 1) / max(os.getloadavg()[0], 1e-3))
        if PRESSURE.exists():
            crowded = min(1.0, (self.waited - before.waited) / (self.at - before.at))
        longest = max(had - before.computed.get(pid, 0.0) for pid, had in self.computed.items())
        return max(min(longest, seconds), seconds * (1 - crowded))


class TooSlow:
    """Looks at most once a second, as the table of processes takes a while to read."""

    def __init__(self) -> None:
        self._last = Usage.now()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        started = monotonic()
        if started - self._last.at > 1:
            self._last = Usage.now()
        yield
        seconds = monotonic() - started
        if seconds <= LIMIT_SECONDS or any(item.get_closest_marker(mark) for mark in MAY_TAKE_LONGER):
            return
        before, self._last = self._last, Usage.now()
        alone = self._last.seconds_alone(seconds, before)
        if alone > LIMIT_SECONDS:
            pytest.fail(
                f"it took {seconds:.1f} s, {alone:.1f} s of a machine of its own; a test of `make test` has "
                f"{LIMIT_SECONDS:.0f}: make it quicker, or mark it slow and leave a quick one in its place",
                pytrace=False,
            )


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.usepdb:
        config.pluginmanager.register(TooSlow())
