"""Where this process is in its run: the step and the phase.

The watchdog reads it to tell a slow rank from one that stands still, an error says where it happened by it, and
planned faults (fault_plan.py) strike by it. It imports no torch: a job's driver comes by here too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tunesmith.train.ranks.fault_plan import FaultPlan
from tunesmith.train.ranks.phases import Phase


@dataclass
class Progress:
    """Of this process."""

    step: int = 0  # optimizer steps done
    phase: Phase = Phase.starting
    num_changes: int = 0
    plan: FaultPlan | None = None
    listeners: "list[Callable[[Progress], None]]" = field(default_factory=list)  # are told of every change


progress = Progress()


def reach(phase: Phase, step: int | None = None) -> None:
    """This process is now in a phase, with that many optimizer steps done. Cheap enough for every micro batch."""
    progress.phase = phase
    if step is not None:
        progress.step = step
    progress.num_changes += 1
    for listener in progress.listeners:
        listener(progress)
    if progress.plan is not None:
        progress.plan.strike(progress.step, phase)


def plan_faults() -> None:
    """Arms the faults that a test has put into the environment; there are none in any other run."""
    progress.plan = FaultPlan.from_environment()
