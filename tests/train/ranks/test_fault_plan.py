"""Faults that tests plan: where they strike, and what is refused."""

import pytest
import torch

from tunesmith.train.ranks.fault_plan import FaultPlan, parse
from tunesmith.train.ranks.phases import Phase


@pytest.mark.parametrize("phase", Phase)
def test_a_fault_can_be_planned_for_each_phase(phase: Phase) -> None:
    assert parse(f"kill:rank=1,phase={phase}").phase is phase


@pytest.mark.parametrize("words", ["committing", "generating", "Forward", ""])
def test_a_phase_that_does_not_exist_is_refused_with_those_that_do(words: str) -> None:
    with pytest.raises(ValueError, match="there is no phase") as caught:
        parse(f"kill:phase={words}")
    assert all(phase in str(caught.value) for phase in Phase)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bit_flips_once_when_the_update_begins_and_in_no_other_phase(dtype: torch.dtype) -> None:
    plan = FaultPlan([parse("flip:rank=1,step=3")], rank=1)
    weight = torch.ones(2, 2, dtype=dtype, requires_grad=True)
    plan.strike(3, Phase.update)  # no weights are known yet: nothing happens, nor is it used up
    plan.weights = lambda: weight
    for step, phase in ((3, Phase.forward), (2, Phase.update)):
        plan.strike(step, phase)
        assert torch.equal(weight, torch.ones_like(weight))
    plan.strike(3, Phase.update)
    flipped = weight.detach().clone()
    assert flipped.ne(1).nonzero().tolist() == [[0, 0]]
    assert abs(flipped[0, 0].item() - 1) <= torch.finfo(dtype).eps
    plan.strike(3, Phase.update)
    assert torch.equal(weight, flipped)


def test_nothing_flips_where_the_rank_holds_nothing_of_the_weight() -> None:
    plan = FaultPlan([parse("flip:step=3")], rank=0)
    plan.weights = lambda: None
    plan.strike(3, Phase.update)
