"""Faults on purpose inside a step, for tests: nothing of this is there unless TUNESMITH_FAULTS is set."""

from typing import Any

from torch import nn

from tunesmith.train.data.store import Batch
from tunesmith.train.model.scorer import Scorer
from tunesmith.train.objective.objective import Objective, Sums
from tunesmith.train.ranks.fault_plan import FaultPlan
from tunesmith.train.ranks.progress import progress
from tunesmith.train.zero.sharding import local_part


class SpoiledObjective:
    """An objective whose losses in training are what a plan makes of them."""

    def __init__(self, objective: Objective, plan: FaultPlan) -> None:
        self._objective = objective
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def sums(self, model: Scorer, batch: Batch) -> Sums:
        sums = self._objective.sums(model, batch)
        return Sums(sums.loss * self._plan.loss_factor(progress.step), sums.totals)


def install(plan: FaultPlan, objective: Objective, model: nn.Module) -> Objective:
    """Hangs a plan's faults on a loop: the objective with spoiled losses, and a weight that changes by itself."""
    plan.weights = lambda: local_part(next(model.parameters()))
    return SpoiledObjective(objective, plan)
