"""A default test has five seconds: what takes longer fails, and belongs to `make test-slow`.

They are seconds of a machine of its own: the share of the cores that other programs and tests took meanwhile does not
count, nor does the set-up of fixtures, which many tests share.
"""

from collections.abc import Generator
from dataclasses import dataclass
from time import monotonic  # bound here: tests put other clocks into the module

import psutil
import pytest

LIMIT_SECONDS = 5.0
MAY_TAKE_LONGER = ("cold", "slow", "torture", "cluster", "gpu")


@dataclass(frozen=True)
class Usage:
    """Seconds of a core that were used since the start of the machine: by all, and by this process and its children."""

    at: float
    by_all: float
    by_us: float

    @classmethod
    def now(cls) -> "Usage":
        machine, ours = psutil.cpu_times(), 0.0
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                ours += sum(process.cpu_times()[:4])  # user and system, and of its children that have ended
            except psutil.NoSuchProcess:
                continue
        return cls(monotonic(), machine.user + machine.nice + machine.system, ours)

    def share_of_others_since(self, start: "Usage") -> float:
        """The fraction of the cores' time that other programs had, 0 to 1."""
        others = (self.by_all - start.by_all) - (self.by_us - start.by_us)
        return min(max(others / (psutil.cpu_count() or 1) / (self.at - start.at), 0.0), 1.0)


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
        alone = seconds * (1 - self._last.share_of_others_since(before))
        if alone > LIMIT_SECONDS:
            pytest.fail(
                f"it took {seconds:.1f} s, {alone:.1f} s of a machine of its own; a test of `make test` has "
                f"{LIMIT_SECONDS:.0f}: make it quicker, or mark it slow and leave a quick one in its place",
                pytrace=False,
            )


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.usepdb:
        config.pluginmanager.register(TooSlow())
