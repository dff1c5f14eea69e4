"""Every fault planted in the LoRA kernels is caught by the tests named with it (mutants.py)."""

import runpy  # noqa: TID251 - of a file in this folder
from pathlib import Path
from typing import Any

import pytest

MUTANTS = runpy.run_path(str(Path(__file__).with_name("mutants.py")))


@pytest.mark.parametrize("mutant", MUTANTS["LORA_MUTANTS"], ids=lambda mutant: mutant.name)
def test_a_fault_is_caught(mutant: Any) -> None:
    assert MUTANTS["caught"](mutant)
