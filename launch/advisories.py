"""Compares what Tunesmith asks for with advisories.toml: no floor and no pin may have an advisory that is known to us.

    python -m tunesmith.launch.advisories

The list is kept by hand: pip-audit needs a network, and this runs without one. Each finding is a line.
"""

import re
import sys
import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tunesmith.launch.arguments import main
from tunesmith.train.errors import TunesmithError
from tunesmith.train.paths import CONF_DIR

ROOT = CONF_DIR.parent


@dataclass(frozen=True)
class Advisory:
    """One entry of advisories.toml."""

    library: str
    id: str
    fixed: str  # the first version without it
    what: str


def read_advisories(root: Path) -> tuple[date, list[Advisory]]:
    """The day of the list, and its entries."""
    tree = tomllib.loads((root / "advisories.toml").read_text(encoding="utf-8"))
    return tree["looked"], [Advisory(**entry) for entry in tree["advisory"]]


def requirements(root: Path) -> dict[str, list[Requirement]]:
    """What pyproject.toml asks for: in "" the direct dependencies, then each extra's, without Tunesmith itself."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        name: [one for one in map(Requirement, texts) if one.name != project["name"]] for name, texts in groups.items()
    }


def floors(root: Path) -> dict[str, list[Version]]:
    """The lowest version that each requirement of a library admits; 0 where it admits any."""
    found: dict[str, list[Version]] = {}
    for one in (one for group in requirements(root).values() for one in group):
        named = [Version(bound.version) for bound in one.specifier if bound.operator in (">=", "==", "~=")]
        found.setdefault(canonicalize_name(one.name), []).append(max(named, default=Version("0")))
    return found


def pins(root: Path) -> dict[str, Version]:
    """The versions of constraints.txt."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [match.groups() for line in lines if (match := re.fullmatch(r"([\w.-]+)==(\S+)", line))]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def problems(root: Path) -> list[str]:
    """A line for each floor or pin below the first version without an advisory, and each library without a floor."""
    pinned, lowest = pins(root), floors(root)
    lines = [f"{name}: pyproject.toml names no floor" for name, known in lowest.items() if min(known) == Version("0")]
    for one in read_advisories(root)[1]:
        name, fixed = canonicalize_name(one.library), Version(one.fixed)
        lines += [
            f"{name}: the floor {floor} of pyproject.toml has {one.id}, set it to {fixed} ({one.what})"
            for floor in lowest.get(name, [])
            if floor < fixed
        ]
        if name in pinned and pinned[name] < fixed:
            lines.append(f"{name}: {pinned[name]} in constraints.txt has {one.id}, which {fixed} has not ({one.what})")
        if name not in pinned and name not in lowest:
            lines.append(f"{name}: advisories.toml has {one.id} of it, and nothing asks for it")
    return lines


def check(arguments: list[str]) -> None:
    """Raises TunesmithError with all findings."""
    looked, known = read_advisories(ROOT)
    if found := problems(ROOT):
        raise TunesmithError("\n  ".join([f"{len(found)} findings by advisories.toml of {looked}:", *found]))
    sys.stdout.write(f"advisories: none of {len(known)} known on {looked} is left\n")


if __name__ == "__main__":
    main(check)
