"""Where a setting got its value: the command line, or a yaml file and its line."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.train.config import yaml_text
from tunesmith.train.paths import CONF_DIR

SHIPPED = "conf"  # how errors name CONF_DIR


@dataclass
class Origins:
    """Finds keys: on the command line first, then in the yaml files from the most specific down.

    Args:
        overrides: as they were typed.
        folders: of yaml files, Tunesmith's first.
    """

    overrides: list[str]
    folders: list[Path]
    _choices: dict[str, list[str]] | None = field(default=None, repr=False)

    def find(self, key: str) -> str:
        """`key (file:line)`, `key (command line: key=value)`, or the key alone when nothing sets it."""
        for override in reversed(self.overrides):
            typed = override.lstrip("+~").split("=", 1)[0]
            if typed == key or typed.startswith(f"{key}."):
                return f"{key} (command line: {one_line(override)})"
        for path, path_key in self._candidates(key):
            if line := line_of_key(path, path_key.split(".")):
                return f"{key} ({shown(path)}:{line})"
        return key

    def choices(self) -> dict[str, list[str]]:
        """The options chosen in each group by command line and defaults lists, the one that wins first."""
        if self._choices is None:
            self._choices = {}
            for override in reversed(self.overrides):
                group, _, options = override.lstrip("+~").partition("=")
                self._choose(group, options.strip("[] ").split(","))
            for name in list(self._choices.get("exp", [])):
                for folder in reversed(self.folders):
                    self._choose_defaults(folder / "exp" / f"{name}.yaml")
            for folder in reversed(self.folders):
                self._choose_defaults(folder / "config.yaml")
        return self._choices

    def _choose(self, group: str, options: list[str]) -> None:
        assert self._choices is not None
        self._choices.setdefault(group, []).extend(option.strip() for option in reversed(options))

    def _choose_defaults(self, path: Path) -> None:
        tree = _mapping(path)
        for entry in tree.get("defaults") or [] if tree else []:
            if isinstance(entry, dict):
                for group, options in entry.items():
                    listed = options if isinstance(options, list) else [options]
                    self._choose(str(group).removeprefix("override ").lstrip("/"), [str(option) for option in listed])

    def _candidates(self, key: str) -> Iterator[tuple[Path, str]]:
        group, _, inner = key.partition(".")
        for folder in reversed(self.folders):
            for name in self.choices().get("exp", []):
                yield folder / "exp" / f"{name}.yaml", key
        for option in self.choices().get(group, []) if inner else []:
            for folder in reversed(self.folders):
                yield folder / group / f"{option}.yaml", inner
        for folder in reversed(self.folders):
            yield folder / "config.yaml", key


def line_of_key(path: Path, keys: list[str]) -> int | None:
    """Line of a nested key in a yaml file, counted from 1; None when the file does not have it."""
    node: Any = _parsed(path)
    line = None
    for name in keys:
        if not isinstance(node, yaml.MappingNode):
            return None
        pairs = {key.value: (key, value) for key, value in node.value}
        if name not in pairs:
            return None
        line, node = pairs[name][0].start_mark.line + 1, pairs[name][1]
    return line


def one_line(text: str) -> str:
    """What was typed; escaped where it would break the line or hide in it."""
    return text if text.isprintable() else repr(text)


def shown(path: Path) -> str:
    """A path as errors name it: conf/... for the files that ship with Tunesmith."""
    return f"{SHIPPED}/{path.relative_to(CONF_DIR)}" if path.is_relative_to(CONF_DIR) else str(path)


def _parsed(path: Path) -> yaml.Node | None:
    """The nodes of a file; no object is built from it. None when it is missing, not text or not yaml."""
    try:
        return yaml_text.nodes_of(yaml_text.read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _mapping(path: Path) -> dict[str, Any] | None:
    try:
        tree = yaml_text.tree_of(yaml_text.read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) else None
