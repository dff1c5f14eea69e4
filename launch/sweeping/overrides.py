"""What a command line and a search space say to the sweep itself: how it searches, and what hands out its trials.

They are written as Hydra's settings, but no Hydra reads them: a key that is not listed here is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tunesmith.launch.sweeping.settings import GROUP, SETTINGS, Sampler, SweeperConfig
from tunesmith.launch.sweeping.submitit_slots import LAUNCHERS
from tunesmith.launch.typed_secrets import refuse_secrets
from tunesmith.train.config import yaml_text
from tunesmith.train.config.compose import SEARCH_SPACES, parse_override
from tunesmith.train.config.origins import Origins, line_of_key, one_line, shown
from tunesmith.train.config.own_yaml import not_yaml
from tunesmith.train.config.suggest import did_you_mean, nearest
from tunesmith.train.errors import ConfigError
from tunesmith.train.redact import redact_text

SWEEPERS = {"grid": Sampler.grid, "random": Sampler.random, "optuna": Sampler.tpe}
CHOICES = {"hydra/sweeper": list(SWEEPERS), "hydra/launcher": list(LAUNCHERS)}
GROUPS = (GROUP, "hydra.launcher")
HEADER = f"# @package {GROUP}"


@dataclass
class CommandLine:
    """The overrides of a sweep, by whom they are for."""

    typed: list[str]
    values: dict[str, Any] = field(default_factory=dict)  # hydra/sweeper, hydra.sweeper.n_trials, ...: what they say
    space: Path | None = None  # the file of +sweep=<name>
    training: list[str] = field(default_factory=list)

    def settings(self, group: str) -> dict[str, Any]:
        """The settings below a group, such as hydra.launcher."""
        prefix = f"{group}."
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}


def read_command_line(typed: Sequence[str], folders: Sequence[Path]) -> CommandLine:
    """Raises ConfigError for a key of Hydra's that a sweep may not set, and for a secret. folders: of yaml files."""
    line = CommandLine(list(typed))
    not_written = []
    for text in typed:
        if text.startswith("-"):
            raise ConfigError(f"{text!r} is not understood.", at="command line", do="see launch/sweep.py --help.")
        override = parse_override(text, several=True)
        key = override.key_or_group
        if key == SEARCH_SPACES:
            if line.space is not None:
                raise ConfigError("there are several search spaces.", at=f"command line: {text}", do="keep one.")
            line.space = _space_file(text, override.value(), folders)
        elif key.split(".")[0].split("/")[0] == "hydra":
            line.values[key] = _checked_value(text, override)
            not_written += [text] if key == f"{GROUP}.storage" else []
        else:
            line.training.append(text)
    refuse_secrets((text for text in typed if text not in not_written), "command line")
    return line


def _space_file(text: str, name: Any, folders: Sequence[Path]) -> Path:
    at, options = f"command line: {one_line(text)}", search_spaces(folders)
    if not text.startswith("+sweep=") or not isinstance(name, str):
        raise ConfigError(f"{text} chooses no search space.", at=at, do="write +sweep=<name>.")
    if name not in options:
        raise ConfigError(
            f"there is no search space {name!r}.{did_you_mean(nearest(name, list(options)))}",
            at=at,
            do=f"choose one of {', '.join(options)}, or write <folder>/sweep/{one_line(name)}.yaml.",
        )
    return options[name]


def search_spaces(folders: Sequence[Path]) -> dict[str, Path]:
    """The yaml files of search spaces, by name."""
    files = {path.stem: path for folder in folders for path in (folder / SEARCH_SPACES).glob("*.yaml")}
    return dict(sorted(files.items()))


def _checked_value(text: str, override: Override) -> Any:
    at, key, value = f"command line: {one_line(text)}", override.key_or_group, override.value()
    group, _, name = key.rpartition(".")
    if not text.startswith(("+", "~")) and key in CHOICES:
        if value not in CHOICES[key]:
            raise ConfigError(f"{key} has no option {value!r}.", at=at, do=f"choose one of {', '.join(CHOICES[key])}.")
        return value
    if text.startswith(("+", "~")) or group not in GROUPS or override.package or override.is_sweep_override():
        raise ConfigError(
            f"{key} is nothing that a sweep may set.",
            at=at,
            do="give one value to hydra.sweeper.<setting>, hydra.launcher.<setting>, hydra/sweeper or hydra/launcher.",
        )
    if group == GROUP:
        _check_setting(name, at)
    return value


def _check_setting(name: str, at: str) -> None:
    if name not in SETTINGS:
        guess = did_you_mean(nearest(name, SETTINGS))
        raise ConfigError(f"{GROUP} has no setting {name!r}.{guess}", at=at, do=f"choose one of {', '.join(SETTINGS)}.")


def read_settings(line: CommandLine) -> SweeperConfig:
    """The checked settings of a sweep: its search space, and the command line, which has the last word.

    Raises ConfigError.
    """
    config = OmegaConf.create({"hydra": {"sweeper": SweeperConfig}})
    chosen = line.values.get("hydra/sweeper")
    typed = ({"sampler": SWEEPERS[chosen]} if chosen else {}) | line.settings(GROUP)
    try:
        if line.space is not None:
            OmegaConf.update(config, GROUP, _read_space(line.space), merge=True)
        for name, value in typed.items():
            OmegaConf.update(config, f"{GROUP}.{name}", value, merge=True)
        settings = OmegaConf.to_object(config.hydra.sweeper)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or GROUP
        what = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise ConfigError(f"{key}: {what}.", key=key, do="docs/sweeps.md lists the settings.") from None
    assert isinstance(settings, SweeperConfig)
    return settings


def _read_space(path: Path) -> DictConfig:
    try:
        text = yaml_text.read_text(path)
        tree = yaml_text.omegaconf_of(text)
    except yaml.YAMLError as error:
        raise not_yaml(error, path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}.", at=shown(path)) from None
    if [row.strip() for row in text.splitlines() if "@package" in row] != [HEADER] or not text.startswith(HEADER):
        raise ConfigError(
            "a search space must say that its keys are the sweeper's.",
            at=f"{shown(path)}:1",
            do=f"make `{HEADER}` its first line, and the only one of its kind.",
        )
    if not isinstance(tree, DictConfig) or not tree:
        raise ConfigError(
            "the file holds no settings.", at=f"{shown(path)}:1", do="write `params:` and what to search."
        )
    for name in map(str, tree):
        _check_setting(name, f"{name} ({shown(path)}:{line_of_key(path, [name])})")
    return tree


@contextmanager
def errors_located(line: CommandLine) -> Iterator[None]:
    """Puts behind the key of an error where it stands: on the command line, or in the file of the search space."""
    try:
        yield
    except ConfigError as error:
        if error.key is not None and error.key.startswith("hydra."):
            error.at = _place(error.key, line)
        raise


def _place(key: str, line: CommandLine) -> str:
    place, space = Origins(line.typed, []).find(key), line.space
    if place == key and space and (number := line_of_key(space, key.removeprefix(f"{GROUP}.").split("."))):
        return f"{key} ({shown(space)}:{number})"
    return redact_text(place)  # a database may have a password
