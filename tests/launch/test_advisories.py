"""What is asked for has no advisory that is known, and is as much as SECURITY.md says."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

from tunesmith.launch.advisories import ROOT, problems, read_advisories, requirements

BROUGHT = {"jinja2": "torch", "pydantic": "deepspeed", "tokenizers": "transformers", "huggingface_hub": "transformers"}
IMPORTED = {"yaml": "pyyaml", "hydra": "hydra-core"}  # under another name
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_no_floor_and_no_pin_has_a_known_advisory() -> None:
    assert problems(ROOT) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("pyproject.toml", "transformers>=5.10", "transformers>=5.9", "floor 5.9 of pyproject.toml has CVE-2026-9856"),
        ("pyproject.toml", "filelock>=3.20.3", "filelock>=3.20.2", "CVE-2026-22701, set it to 3.20.3"),
        ("pyproject.toml", "filelock>=3.20.3", "filelock", "filelock: pyproject.toml names no floor"),
        ("constraints.txt", "hydra-core==1.3.8", "hydra-core==1.3.6", "1.3.6 in constraints.txt has CVE-2026-68508"),
        ("advisories.toml", 'library = "wandb"', 'library = "wanbd"', "nothing asks for it"),
    ],
)
def test_one_that_has_is_found(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    for name in ("pyproject.toml", "constraints.txt", "advisories.toml"):
        shutil.copy(ROOT / name, tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    assert said in "\n".join(problems(tmp_path))


def test_security_md_names_every_advisory_and_the_number_of_dependencies() -> None:
    looked, known = read_advisories(ROOT)
    assert [one.id for one in known if one.id not in SECURITY] == []
    assert str(looked) in SECURITY
    count = re.search(r"\*\*(\d+)\*\* direct dependencies", SECURITY)
    assert count is not None
    assert int(count[1]) == len(requirements(ROOT)[""])


WHERE_INSTALLED = {"flash_attn"}  # used where a person has built it; its wheels are for one torch and CUDA each


def test_what_is_imported_is_asked_for() -> None:
    asked = {one.name for group in requirements(ROOT).values() for one in group}
    asked |= {name for name, by in BROUGHT.items() if by in asked}
    found: dict[str, str] = {}
    for path in (path for room in ("train", "launch", "kernels") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.split(".")[0]: str(path) for name in names}
    foreign = {
        name: path
        for name, path in found.items()
        if name not in {*sys.stdlib_module_names, "tunesmith", *WHERE_INSTALLED}
    }
    assert {name: path for name, path in foreign.items() if IMPORTED.get(name, name) not in asked} == {}
