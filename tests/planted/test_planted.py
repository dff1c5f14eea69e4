"""The planted faults still fit the code and name tests that are there; that each is caught: make planted (plant.py)."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = sorted(Path(__file__).parent.glob("*.patch"))


def test_there_are_more_than_fifty() -> None:
    assert len(PATCHES) > 53


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_fault_fits_the_code_and_names_its_tests(patch: Path) -> None:
    done = subprocess.run(
        ["git", "apply", "--check", "-C1", "--recount", patch], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    named = [
        line.removeprefix("caught by: ") for line in patch.read_text().splitlines() if line.startswith("caught by:")
    ]
    assert named
    assert all((ROOT / name.partition("::")[0]).exists() for name in named)
