"""The house: which room may import which (docs/architecture.md), read from every import statement of the code."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from zygote import Zygote

ROOT = Path(__file__).parents[1]
# Each may import those before it. engine and optimizer are files, the others folders.
ROOMS = (
    *(
        "errors",
        "paths",
        "printable",
        "redact",
        "config",
        "ranks",
        "files",
        "data",
        "track",
        "profile",
        "watch",
        "zero",
    ),
    *("model", "objective", "optimizer", "engine", "checkpoint", "answer", "run"),
)
APART = {("answer", "checkpoint"), ("watch", "data"), ("objective", "track"), ("objective", "watch")}
# Libraries that are at home in some rooms only.
HOMES = {
    "deepspeed": {"zero"},
    "wandb": {"track"},
    "optuna": {"launch.sweeping"},
    "transformers": {"data", "model", "answer", "zero"},
    "peft": {"model", "answer"},
    "hydra": {"config", "launch.sweeping"},
    "submitit": {"launch.sweeping"},
    "triton": {"kernels"},
}


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports anywhere in it, with the line: tunesmith.train.files.durable."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def room_of(path: Path) -> str:
    """run for train/run/guards/guards.py; kernels; launch.sweeping."""
    top, *inner = path.relative_to(ROOT).parts
    if top == "train":
        return inner[0].removesuffix(".py")
    return f"{top}.{inner[0]}" if top == "launch" and len(inner) > 1 else top


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def arrows() -> Iterator[tuple[Path, int, str, str]]:
    """Every import of one room of train/ by another."""
    for path in sources("train"):
        here = room_of(path)
        for module, line in imports(path):
            if module.startswith("tunesmith.train."):
                there = module.split(".")[2]
                if there != here:
                    yield path, line, here, there


def test_every_room_imports_only_rooms_before_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {here} imports {there}"
        for path, line, here, there in arrows()
        if ROOMS.index(there) > ROOMS.index(here) or (here, there) in APART
    ]
    assert not wrong


def test_no_two_modules_import_each_other() -> None:
    """Also not by way of others, nor in a function: what has to be imported late is in a circle."""
    graph: dict[str, set[str]] = {}
    known = {module_name(path): path for path in sources("train", "kernels", "launch")}
    for name, path in known.items():
        found = {module for module, _ in imports(path)} | {module.rpartition(".")[0] for module, _ in imports(path)}
        graph[name] = (found & known.keys()) - {name}
    done: set[str] = set()
    for start in graph:
        assert_no_circle(start, graph, [], done)


def module_name(path: Path) -> str:
    return "tunesmith." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def assert_no_circle(name: str, graph: dict[str, set[str]], above: list[str], done: set[str]) -> None:
    assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
    if name not in done:
        for there in sorted(graph[name]):
            assert_no_circle(there, graph, [*above, name], done)
        done.add(name)


def test_kernels_import_nothing_of_train_and_train_nothing_of_launch() -> None:
    for folder, banned in (("kernels", ("train", "launch")), ("train", ("launch",))):
        for path in sources(folder):
            for module, line in imports(path):
                assert not module.startswith(tuple(f"tunesmith.{name}" for name in banned)), f"{path}:{line}: {module}"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_at_home_in_its_rooms_only(library: str) -> None:
    guests = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources("train", "kernels", "launch")
        for module, line in imports(path)
        if module.split(".")[0] == library and room_of(path) not in HOMES[library]
    ]
    assert not guests


def test_deepspeed_is_imported_only_once_a_run_is_ready(zygote: Zygote) -> None:
    """It takes seconds, and picks its accelerator while it is imported."""
    assert zygote.imported_early == []


def test_only_the_optimizers_file_knows_adamw() -> None:
    """The yaml and the schema name its settings; a checkpoint's moments are read from its state."""
    for path in sources("train"):
        if room_of(path) not in ("optimizer", "config"):
            assert not re.search("AdamW|CPUAdam", path.read_text(encoding="utf-8")), path


def test_every_room_says_what_it_is_for() -> None:
    folders = {path.parent for path in sources("train") if path.parent.name != "train"}
    folders |= {path.parent for path in sources("kernels") if path.parent.name != "kernels"}
    for folder in folders:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert said, folder
        assert len(said.splitlines()) <= 10, folder
