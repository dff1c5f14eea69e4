"""Finds code that could run what it reads and that ruff cannot find; `make lint` calls it after ruff.

    python -m tunesmith.launch.unsafe_code [file or folder ...]    the whole tree where none is given

Each finding is a line `file:line: code what`. An exception is marked on its line, with the reason:
`# noqa: TS002 - a type, nothing is read`. Ruff's own security rules want a reason too.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.launch.arguments import main
from tunesmith.train.errors import TunesmithError
from tunesmith.train.paths import CONF_DIR

ROOT = CONF_DIR.parent
EVALUATES = frozenset({"eval", "exec", "compile", "__import__", "execfile"})
# Each sends a pickle to the other ranks, under any name that torch.distributed was imported as.
OBJECT_COLLECTIVES = frozenset(
    {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
    | {"send_object_list", "recv_object_list", "isend_object_list", "irecv_object_list"}
)
RUNS_A_NAME = frozenset({"instantiate", "register_new_resolver", "register_resolver"})
# Disabling a rule that keeps code from running needs a reason.
SECURITY_CODES = re.compile(r"TS\d+|S\d{3}|TID251")
NOQA = re.compile(r"#\s*noqa:\s*(?P<codes>[A-Z]+\d+(?:[,\s]+[A-Z]+\d+)*)(?P<reason>.*)")
MIN_REASON = 8  # characters

CODES = {
    "TS001": "torch.load without weights_only=True reads a pickle",
    "TS002": "it runs a text as code",
    "TS003": "an object collective sends pickles; train/ranks/distributed.py has broadcast_text and gather_floats",
    "TS004": "allow_pickle lets an array file run code",
    "TS005": "a shell reads the command; give subprocess a list and no shell",
    "TS006": "trust_remote_code must come from the config",
    "TS007": "it calls or registers what a config names",
    "TS008": "a security rule is disabled without a reason: write it after the code",
}


@dataclass(frozen=True)
class Finding:
    """One place in one file."""

    path: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.code} {CODES[self.code]}"


def findings(path: Path) -> list[Finding]:
    """What one Python file does that it must not, and is not marked as an exception; in the order of its lines."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    marks = {token.start[0]: NOQA.search(token.string) for token in tokens if token.type == tokenize.COMMENT}
    found = []
    for line, code in sorted(set(_unsafe(ast.parse(text, str(path))))):
        mark = marks.get(line)
        if not (mark and code in mark["codes"]):
            found.append(Finding(path, line, code))
    unexplained = [number for number, mark in marks.items() if mark and _lacks_reason(mark)]
    return sorted([*found, *(Finding(path, number, "TS008") for number in unexplained)], key=lambda f: f.line)


def _lacks_reason(mark: re.Match[str]) -> bool:
    return bool(SECURITY_CODES.search(mark["codes"])) and len(mark["reason"].strip(" -:")) < MIN_REASON


def _unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    imported = _names_of_torch_load(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, code) for code in _in_call(node, imported))
        elif isinstance(node, ast.Name) and node.id in EVALUATES:  # also `run = eval`
            yield node.lineno, "TS002"
        elif isinstance(node, ast.Attribute) and node.attr in OBJECT_COLLECTIVES:
            yield node.lineno, "TS003"
        elif isinstance(node, ast.Attribute) and node.attr in RUNS_A_NAME:
            yield node.lineno, "TS007"
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if names & OBJECT_COLLECTIVES:
                yield node.lineno, "TS003"
            if names & RUNS_A_NAME:
                yield node.lineno, "TS007"
            if node.module == "builtins" and names & EVALUATES:
                yield node.lineno, "TS002"


def _names_of_torch_load(tree: ast.AST) -> set[str]:
    """What torch.load is called in a file: `torch.load`, `t.load` after `import torch as t`, `load` after `from`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {f"{alias.asname or alias.name}.load" for alias in node.names if alias.name == "torch"}
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "load"}
            names |= {f"{alias.asname or alias.name}.load" for alias in node.names if alias.name == "serialization"}
    return names | {f"{name[: -len('.load')]}.serialization.load" for name in names if name.endswith(".load")}


def _in_call(call: ast.Call, torch_load: set[str]) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    function = ast.unparse(call.func)
    if function in torch_load and not _is(given.get("weights_only"), True):
        yield "TS001"
    if function.startswith(("builtins.", "__builtins__.")) and function.rsplit(".", 1)[1] in EVALUATES:
        yield "TS002"
    if "allow_pickle" in given and not _is(given["allow_pickle"], False):
        yield "TS004"
    if "shell" in given and not _is(given["shell"], False):
        yield "TS005"
    if _is(given.get("trust_remote_code"), True):
        yield "TS006"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def python_files(arguments: list[str]) -> list[Path]:
    """The Python files of some files and folders; without any, those that git knows or would add."""
    if arguments:
        paths = [Path(argument) for argument in arguments]
        return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def unsafe_code(arguments: list[str]) -> None:
    """Raises TunesmithError with all findings."""
    files = python_files(arguments)
    found = [finding for file in files for finding in findings(file)]
    if found or not files:
        lines = "\n  ".join(str(finding) for finding in found)
        raise TunesmithError(f"{len(found)} places in {len(files)} files could run what they read:\n  {lines}")
    sys.stdout.write(f"unsafe code: none in {len(files)} files\n")


if __name__ == "__main__":
    main(unsafe_code)
