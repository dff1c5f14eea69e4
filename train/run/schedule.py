"""The learning rate at an optimizer step; nothing else counts steps."""

import math
from collections.abc import Callable

from tunesmith.train.config.config import ScheduleConfig, ScheduleKind


def learning_rate_factor(schedule: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """step (from 0) -> share of the top learning rate, for a run of total_steps.

    Warm-up reaches the top at its last step; the decay would reach final_fraction one step after the run's last.
    """
    warmup = math.ceil(schedule.warmup_fraction * total_steps)
    decay = math.ceil(schedule.decay_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule.kind is ScheduleKind.constant:
            return 1.0
        if schedule.kind is ScheduleKind.wsd:
            done = _progress(step, total_steps - decay, total_steps)
            return 1.0 - (1.0 - schedule.final_fraction) * done
        done = _progress(step, warmup, total_steps)
        if schedule.kind is ScheduleKind.cosine:
            done = (1.0 - math.cos(math.pi * done)) / 2
        return 1.0 - (1.0 - schedule.final_fraction) * done

    return factor


def _progress(step: int, start: int, total_steps: int) -> float:
    """0 up to start, then a line that would meet 1 one step after the run, so that no step is spent at the end."""
    return max(0.0, (step - start) / max(1, total_steps - start))
