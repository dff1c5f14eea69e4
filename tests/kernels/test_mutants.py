"""Every fault planted in the kernels is caught by the tests named with it (mutants.py)."""

import runpy  # noqa: TID251 - of a file in this folder
from pathlib import Path
from typing import Any

import pytest

MUTANTS = runpy.run_path(str(Path(__file__).with_name("mutants.py")))
QUICK = (  # of each folder of kernels one or two
    "columns past the end are counted",
    "the label counted twice",
    "the mask left out of dA",
    "a member with another's B",
    "the norm's own share left out of dx",
    "the gradient turned the wrong way",
)


def test_the_quick_ones_are_there() -> None:
    assert {mutant.name for mutant in MUTANTS["MUTANTS"]} >= set(QUICK)


@pytest.mark.cold
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=mutant.name, marks=[] if mutant.name in QUICK else [pytest.mark.slow])
        for mutant in MUTANTS["MUTANTS"]
    ],
)
def test_a_fault_is_caught(mutant: Any) -> None:
    assert MUTANTS["caught"](mutant)
