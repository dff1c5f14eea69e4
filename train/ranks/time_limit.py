"""When a run has to stop so that it is saved within its time.

All of it on the monotonic clock: a wall clock that is set changes nothing.
"""

import math
import time
from collections import deque

from tunesmith.train.errors import ConfigError

SAVE_FACTOR = 1.5  # of the longest save: the next one may be slower
STEP_FACTOR = 2.0  # of the longest of the recent steps: one more is made before the limit is looked at again
RECENT_STEPS = 20
ASSUMED_BYTES_PER_SECOND = 200e6  # of the first save, until one is measured: a busy network disk
ASSUMED_SECONDS = 10.0  # besides


def assumed_save_seconds(num_bytes: int) -> float:
    return ASSUMED_SECONDS + num_bytes / ASSUMED_BYTES_PER_SECOND


class TimeLimit:
    """The time a process has, and what it needs to end well.

    Args:
        minutes: from the start of the process; None: no limit.
        started: of the process, on the monotonic clock.
        save_seconds: of a save, until one is measured.
    """

    def __init__(self, minutes: float | None, *, started: float, save_seconds: float) -> None:
        self._minutes = minutes
        self._started = started
        self._assumed_save = save_seconds
        self._longest_save = 0.0
        self._longest_evaluation = 0.0
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)

    def count_step(self, seconds: float) -> None:
        self._steps.append(seconds)

    def count_save(self, seconds: float) -> None:
        self._longest_save = max(self._longest_save, seconds)

    def count_evaluation(self, seconds: float) -> None:
        self._longest_evaluation = max(self._longest_evaluation, seconds)

    def seconds_left(self) -> float:
        if self._minutes is None:
            return math.inf
        return 60.0 * self._minutes - (time.monotonic() - self._started)

    def margin(self, *, another_step: bool = False, evaluation_due: bool = False) -> float:
        """Seconds that saving takes, and what comes before the limit is looked at again."""
        step = STEP_FACTOR * max(self._steps, default=0.0) if another_step else 0.0
        evaluation = self._longest_evaluation if evaluation_due else 0.0
        return SAVE_FACTOR * (self._longest_save or self._assumed_save) + step + evaluation

    def is_near(self, *, another_step: bool = False, evaluation_due: bool = False) -> bool:
        return self.seconds_left() <= self.margin(another_step=another_step, evaluation_due=evaluation_due)

    def too_short(self) -> ConfigError:
        """What to say when it is near before the first step: every start of the run would end like this."""
        taken, save = time.monotonic() - self._started, SAVE_FACTOR * self._assumed_save
        return ConfigError(
            f"time_limit_minutes={self._minutes:g} is over before the first step: the start took {taken:.0f} s, and "
            f"{save:.0f} s are kept for saving.",
            key="cluster.time_limit_minutes",
            do=f"give more than {(taken + save) / 60:.1f} minutes.",
        )
