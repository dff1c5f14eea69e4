"""What a command line and a search space may say to Hydra itself: which sweeper and launcher, and their settings.

All else below `hydra` names classes that Hydra would run (callbacks, logging handlers, plugins): it is refused where it
is typed, and once more in what was composed of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tunesmith.launch.sweeping.hydra_checks import JOB_NAME, LAUNCHER_SETTINGS, LAUNCHERS, check_composed
from tunesmith.launch.sweeping.plan import quoted
from tunesmith.launch.sweeping.settings import GROUP, SETTINGS, Sampler, SweeperConfig
from tunesmith.train.config.compose import SEARCH_SPACES, admit_raw_key, parse_override
from tunesmith.train.config.config import Config
from tunesmith.train.config.origins import line_of_key, one_line, shown
from tunesmith.train.config.own_yaml import not_yaml
from tunesmith.train.config.suggest import did_you_mean, nearest
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import CONF_DIR

SWEEPERS = {"grid": Sampler.grid, "random": Sampler.random, "optuna": Sampler.tpe}
CHOICES = {"hydra/sweeper": list(SWEEPERS), "hydra/launcher": list(LAUNCHERS)}
HEADER = f"# @package {GROUP}"


@dataclass(frozen=True)
class Split:
    """A command line, by whom it is for."""

    hydra: list[str]  # hydra/sweeper=..., hydra.sweeper....=..., hydra/launcher=..., hydra.launcher....=...
    space: str | None  # the name of +sweep=<name>
    training: list[str]


def split(overrides: Sequence[str]) -> Split:
    """Raises ConfigError for a Hydra key that a sweep may not set."""
    hydra: list[str] = []
    spaces: list[str] = []
    training: list[str] = []
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(f"{text!r} is not understood.", at="command line", do="see launch/sweep.py --help.")
        override = parse_override(text)
        key = override.key_or_group
        if key == SEARCH_SPACES:
            spaces.append(_space_name(text, override.value()))
        elif key.split(".")[0].split("/")[0] == "hydra":
            _check_hydra_override(text, key, override.value())
            hydra.append(text)
        else:
            training.append(text)
    if len(spaces) > 1:
        raise ConfigError("there are several search spaces.", at=f"command line: {' '.join(spaces)}", do="keep one.")
    return Split(hydra, spaces[0] if spaces else None, training)


def _space_name(text: str, value: Any) -> str:
    if not text.startswith("+sweep=") or not isinstance(value, str):
        raise ConfigError(
            f"{text} chooses no search space.", at=f"command line: {one_line(text)}", do="write +sweep=<name>."
        )
    return value


def _check_hydra_override(text: str, key: str, value: Any) -> None:
    at = f"command line: {one_line(text)}"
    if key in CHOICES:
        if text.startswith(("+", "~")) or value not in CHOICES[key]:
            raise _no_such_choice(key, value, at)
        return
    group, _, name = key.rpartition(".")
    if text.startswith(("+", "~")) or group not in (GROUP, "hydra.launcher"):
        raise ConfigError(
            f"{key} is nothing that a sweep may set.",
            at=at,
            do="set hydra.sweeper.<setting>, hydra.launcher.<setting>, hydra/sweeper or hydra/launcher.",
        )
    known = SETTINGS if group == GROUP else LAUNCHER_SETTINGS
    _check_setting(group, name, list(known), at)
    if group == "hydra.launcher":
        _check_plain(key, value, at)


def _check_setting(group: str, name: str, known: list[str], at: str) -> None:
    if name not in known:
        raise ConfigError(
            f"{group} has no setting {name!r}.{did_you_mean(nearest(name, known))}",
            at=at,
            do=f"choose one of {', '.join(known)}.",
        )


def _check_plain(key: str, value: Any, at: str) -> None:
    if not isinstance(value, str | int | float | bool | None):
        raise ConfigError(f"{key} takes one plain value.", at=at, do=f"write {key}=<value>.")


def _no_such_choice(group: str, value: Any, at: str) -> ConfigError:
    return ConfigError(f"{group} has no option {value!r}.", at=at, do=f"choose one of {', '.join(CHOICES[group])}.")


def space_file(name: str, folders: Sequence[Path]) -> Path:
    """The yaml file of a search space, which is looked through. Raises ConfigError."""
    options = {path.stem: path for folder in folders for path in sorted((folder / SEARCH_SPACES).glob("*.yaml"))}
    if name not in options:
        raise ConfigError(
            f"there is no search space {name!r}.{did_you_mean(nearest(name, list(options)))}",
            at=f"command line: +sweep={one_line(name)}",
            do=f"choose one of {', '.join(sorted(options))}, or write <folder>/sweep/{one_line(name)}.yaml.",
        )
    _check_space(options[name])
    return options[name]


def _check_space(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise not_yaml(error, path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}.", at=shown(path)) from None
    if [line.strip() for line in text.splitlines() if "@package" in line] != [HEADER] or not text.startswith(HEADER):
        raise ConfigError(
            "a search space must say that its keys are the sweeper's.",
            at=f"{shown(path)}:1",
            do=f"make `{HEADER}` its first line, and the only one of its kind.",
        )
    if not isinstance(tree, dict):
        raise ConfigError(
            "the file holds no settings.", at=f"{shown(path)}:1", do="write `params:` and what to search."
        )
    for name, value in tree.items():
        _check_setting(GROUP, str(name), SETTINGS, f"{name} ({shown(path)}:{line_of_key(path, [str(name)])})")
        if name == "params":
            _check_params(value, path)


def _check_params(params: Any, path: Path) -> None:
    for name, value in params.items() if isinstance(params, dict) else [("params", params)]:
        if not isinstance(params, dict) or isinstance(value, dict | list):
            line = line_of_key(path, ["params", str(name)]) or line_of_key(path, ["params"])
            raise ConfigError(
                f"{name} has no values in Hydra's grammar.",
                at=f"{GROUP}.params ({shown(path)}:{line})",
                do="write a line for each key, such as `adapter.r: choice(8, 16)`.",
            )


def register() -> None:
    """Makes the schema and our sweepers known to Hydra: options of hydra/sweeper."""
    ConfigStore.instance().store(name="schema", node=Config)
    for name, sampler in SWEEPERS.items():
        node = OmegaConf.structured(SweeperConfig)
        node.sampler = sampler
        ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="tunesmith")


def hydra_arguments(parts: Split, config_dir: Path | None) -> list[str]:
    """The overrides that Hydra gets besides those of the training."""
    typed = next((text.split("=", 1)[1] for text in parts.hydra if text.startswith("hydra/sweeper=")), None)
    arguments = [] if typed else ["hydra/sweeper=grid"]
    if parts.space is not None:
        arguments.append(f"+{SEARCH_SPACES}={parts.space}")
    if typed:  # the command line has the last word, also over the file of a search space
        arguments.append(f"hydra.sweeper.sampler={SWEEPERS[typed]}")
    return [*arguments, *parts.hydra, *search_path(config_dir)]


def search_path(config_dir: Path | None) -> list[str]:
    """The override by which Hydra searches the user's own folder too."""
    return [] if config_dir is None else [f"hydra.searchpath=[{quoted(f'file://{config_dir}')}]"]


@contextmanager
def initialised() -> Iterator[Any]:
    """Hydra over conf/."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3", job_name=JOB_NAME):
        yield GlobalHydra.instance().hydra


def check_trial(overrides: Sequence[str], config_dir: Path | None) -> None:
    """Raises ConfigError when the yaml files that a trial chooses set anything of Hydra's that names what to run.

    A trial itself only composes; a launcher of Hydra does more with what it gets.
    """
    arguments = [*(admit_raw_key(text) for text in overrides), *search_path(config_dir)]
    with initialised() as hydra:
        composed(hydra, arguments, Locator(overrides, None))


def composed(hydra: Any, arguments: Sequence[str], locate: "Locator") -> DictConfig:
    """What Hydra makes of a multirun's overrides. Raises ConfigError, also for anything to run that has crept in."""
    try:
        config = hydra.compose_config("config", list(arguments), RunMode.MULTIRUN, with_log_configuration=False)
    except (OmegaConfBaseException, HydraException) as error:
        raise _translated(error, locate) from None
    check_composed(config, locate)
    return config


def settings_of(config: DictConfig, locate: "Locator") -> SweeperConfig:
    """The checked settings of the sweeper. Raises ConfigError."""
    try:
        settings = OmegaConf.to_object(config.hydra.sweeper)
    except OmegaConfBaseException as error:
        raise _translated(error, locate) from None
    except ConfigError as error:
        raise located(error, locate) from None
    assert isinstance(settings, SweeperConfig)
    return settings


def _translated(error: BaseException, locate: "Locator") -> ConfigError:
    cause: BaseException = error
    while not getattr(cause, "full_key", None) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    key = getattr(cause, "full_key", None) or GROUP
    text = str(cause).strip().split("\n", 1)[0].rstrip(".")
    return ConfigError(f"{key}: {text}.", at=locate(key), do="docs/sweeps.md lists the settings.")


class Locator:
    """Where a setting of the sweep stands: on the command line, or in the file of the search space."""

    def __init__(self, typed: Sequence[str], space: Path | None) -> None:
        self._typed, self._space = typed, space

    def __call__(self, key: str) -> str:
        for text in reversed(self._typed):
            if text.split("=", 1)[0] == key:
                return f"{key} (command line: {one_line(text)})"
        line = line_of_key(self._space, key.removeprefix(f"{GROUP}.").split(".")) if self._space else None
        return f"{key} ({shown(self._space)}:{line})" if self._space and line else key


def located(error: ConfigError, locate: Locator) -> ConfigError:
    """The error with the place of its key."""
    if error.key is not None and error.key.startswith("hydra."):
        error.at = locate(error.key)
    return error


def folders(config_dir: Path | None) -> list[Path]:
    return [CONF_DIR, *([config_dir] if config_dir else [])]
