"""A person's own yaml files (--config-dir), checked before Hydra composes them, as its errors name no line."""

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult

from tunesmith.train.config import yaml_text
from tunesmith.train.config.config import Config
from tunesmith.train.config.origins import Origins, line_of_key, shown
from tunesmith.train.config.override_text import typed
from tunesmith.train.config.suggest import did_you_mean, nearest
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import CONF_DIR

GLOBAL_PACKAGE = re.compile(r"^#\s*@package\s+_global_\s*$", re.MULTILINE)
HYDRA_PACKAGE = re.compile(r"^#\s*@package\s+hydra\b|^\s*-\s*\S+@hydra\b", re.MULTILINE)
RENAMED = {("profile", "torch"): "on", ("profile", "off"): "none"}  # options of before, or in other words
Options = Callable[[str], list[str]]  # a group -> its options


class OwnFiles(FileConfigSource):
    """The folder, for Hydra: every file that it opens there, by whatever defaults list, is checked first."""

    @staticmethod
    def scheme() -> str:
        return "own"

    def load_config(self, config_path: str) -> ConfigResult:
        """Raises ConfigError."""
        path = Path(self.path, self._normalize_file_name(config_path))
        if path.is_file():
            _read(path)
        return super().load_config(config_path)


def _read(path: Path) -> tuple[str, Any]:
    """The text of a file and its tree. Raises ConfigError."""
    try:
        text = yaml_text.read_text(path)
        return text, yaml_text.tree_of(text)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 at byte {error.start + 1}.", at=shown(path), do="save the file as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"the file can't be read: {error.strerror}.", at=shown(path)) from None
    except yaml.YAMLError as error:
        raise not_yaml(error, path) from None


def check_own_folder(folder: Path, origins: Origins, options: Options) -> None:
    """Raises ConfigError for a mistake in the chosen yaml files of the folder, or when there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}.", at="--config-dir", do="give the folder with your yaml files."
        )
    for path in sorted(folder.glob("*/*.yaml")):
        if folder != CONF_DIR and (CONF_DIR / path.relative_to(folder)).is_file():
            raise ConfigError(
                f"{path.relative_to(folder)} has the name of a file of Tunesmith, which would be used instead.",
                at=str(path),
                do="give your file another name.",
            )
    for group, chosen in origins.choices().items():
        for path in [folder / group / f"{option}.yaml" for option in chosen]:
            if path.is_file():
                _check_file(path, group, options)


def _check_file(path: Path, group: str, options: Options) -> None:
    text, tree = _read(path)
    if group == "exp" and not GLOBAL_PACKAGE.search(text):
        raise ConfigError(
            "an experiment must say that its keys are those of the whole run.",
            at=f"{shown(path)}:1",
            do="make `# @package _global_` its first line.",
        )
    if number := _sexagesimal(yaml_text.nodes_of(text)):
        raise ConfigError(
            f"{number.value} without quotes is the number {yaml_text.tree_of(number.value)} in yaml.",
            at=f"{shown(path)}:{number.start_mark.line + 1}",
            do=f'write it in quotes: "{number.value}".',
        )
    if not isinstance(tree, dict):
        kind = "nothing" if tree is None else "a list" if isinstance(tree, list) else f"{tree!r}"
        raise ConfigError(
            f"the file holds {kind}, not settings.", at=f"{shown(path)}:1", do="write `key: value` lines."
        )
    if "hydra" in tree or HYDRA_PACKAGE.search(text):
        raise ConfigError(
            "Hydra only composes here, so its own settings have no effect.",
            at=f"hydra ({shown(path)}:{line_of_key(path, ['hydra']) or 1})",
            do="remove them; output_dir=<folder> sets the run folder.",
        )
    _check_defaults(path, tree.get("defaults"), options)
    if group == "exp":
        _check_groups(path, tree)


def _sexagesimal(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first number such as 24:00:00 in a tree: yaml 1.1 reads it to the base of 60."""
    if isinstance(node, yaml.ScalarNode):
        return node if node.tag.endswith((":int", ":float")) and ":" in node.value else None
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = [value for _, value in node.value]
    return next((found for part in inner if (found := _sexagesimal(part))), None)


def _check_defaults(path: Path, entries: Any, options: Options) -> None:
    at = f"defaults ({shown(path)}:{line_of_key(path, ['defaults'])})"
    for entry in entries if isinstance(entries, list) else []:
        for name, choice in entry.items() if isinstance(entry, dict) else []:
            group = str(name).removeprefix("override ").lstrip("/")
            known = options(group)
            if not known:
                guess = did_you_mean(nearest(group, [key for key, hint in _groups()]))
                raise ConfigError(f"there is no group {group!r}.{guess}", at=at, do="docs/config.md lists every group.")
            for option in choice if isinstance(choice, list) else [choice]:
                check_option(group, option, known, at)


def _check_groups(path: Path, tree: dict[str, Any]) -> None:
    for name, _ in _groups():
        if name in tree and not isinstance(tree[name], dict):
            line = line_of_key(path, [name])
            raise ConfigError(
                f"{name} is a group of settings, not {tree[name]!r}.",
                at=f"{name} ({shown(path)}:{line})",
                do=f"write its settings below it, or choose an option in the defaults list: override /{name}.",
            )


def _groups() -> list[tuple[str, Any]]:
    return [(name, hint) for name, hint in get_type_hints(Config).items() if is_dataclass(hint)]


def check_option(group: str, option: object, known: list[str], at: str) -> None:
    """Raises ConfigError unless the option is one of its group's."""
    if option in known:
        return
    if group == "resume":
        raise ConfigError(
            f"resume has no option {option!r}: it is auto or never.",
            at=at,
            do=f"write {typed('resume.source', option)} to go on from that folder." if option else "leave it out.",
        )
    if isinstance(option, bool) and "on" in known:
        raise ConfigError(
            f"{group} has no option {option!r}: yaml reads on and off as true and false.",
            at=at,
            do=f"""choose one of {", ".join(known)}, with quotes in a file: "on".""",
        )
    guess = RENAMED.get((group, str(option))) or nearest(str(option), known)
    raise ConfigError(
        f"{group} has no option {option!r}.{did_you_mean(guess)}",
        at=at,
        do=f"choose one of {', '.join(known)}.",
    )


def not_yaml(error: yaml.YAMLError, path: Path | None = None) -> ConfigError:
    """A yaml library's error with file and line, in one sentence."""
    mark = getattr(error, "problem_mark", None)
    if path is None and mark and Path(mark.name).is_absolute():
        path = Path(mark.name)
    at = "config files" if path is None else f"{shown(path)}:{mark.line + 1}" if mark else shown(path)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    what = "this yaml is not read" if isinstance(error, yaml_text.NotBuilt) else "not valid yaml"
    return ConfigError(f"{what}: {problem}.", at=at, do="correct that line.")
