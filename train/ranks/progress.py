"""Where this process is in its run: the step and the phase.

The watchdog reads it to tell a slow rank from one that stands still, an error says where it happened by it, and
planned faults (fault_plan.py) strike by it. torch is imported where it is used: a job's driver, which trains nothing,
comes by here too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.train.ranks.fault_plan import FaultPlan

if TYPE_CHECKING:
    import torch


@dataclass
class Progress:
    """Of this process. `changed` is on the monotonic clock, in seconds."""

    step: int = 0  # optimizer steps done
    phase: str = "starting"
    changed: float = field(default_factory=time.monotonic)
    num_changes: int = 0
    plan: FaultPlan | None = None
    listener: "Callable[[Progress], None] | None" = None  # is told of every change


progress = Progress()


def reach(phase: str, step: int | None = None) -> None:
    """This process is now in a phase, with that many optimizer steps done. Cheap enough for every micro batch."""
    progress.phase = phase
    if step is not None:
        progress.step = step
    progress.changed = time.monotonic()
    progress.num_changes += 1
    if progress.listener is not None:
        progress.listener(progress)
    if progress.plan is not None:
        progress.plan.strike(progress.step, phase)


def plan_faults() -> None:
    """Arms the faults that a test has put into the environment; there are none in any other run."""
    progress.plan = FaultPlan.from_environment()


def spoiled(loss: "torch.Tensor") -> "torch.Tensor":
    """The loss as it is, or as a planned fault makes it."""
    return loss if progress.plan is None else loss * progress.plan.loss_factor(progress.step)


def corrupted(weight: "torch.Tensor | None") -> None:
    """Flips the lowest bit of a weight's first element where a planned fault says so."""
    if weight is not None and progress.plan is not None and progress.plan.flips_a_weight(progress.step):
        import torch

        bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
        weight.detach().view(-1)[:1].view(bits).bitwise_xor_(1)
