"""Names for stretches of time in a trace: each step, and in it each phase that a rank reaches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from tunesmith.train.ranks.progress import Progress, progress

STEP, PHASE = "tunesmith step ", "tunesmith: "


class Ranges:
    """Opens a range at each phase while it listens; there is none otherwise.

    Args:
        opened: makes a range of a name: record_function for torch.profiler, nvtx.range for nsys.
    """

    def __init__(self, opened: Callable[[str], AbstractContextManager[object]]) -> None:
        self._opened = opened
        self._step, self._phase = ExitStack(), ExitStack()

    def begin_step(self, step: int) -> None:
        self._step.enter_context(self._opened(f"{STEP}{step}"))
        progress.listeners.append(self._reached)

    def end_step(self) -> None:
        """Also of no step."""
        if self._reached in progress.listeners:
            progress.listeners.remove(self._reached)
        self._phase.close()
        self._step.close()

    def _reached(self, now: Progress) -> None:
        self._phase.close()
        self._phase.enter_context(self._opened(f"{PHASE}{now.phase}"))
