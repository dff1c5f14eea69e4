"""From yaml files and command-line overrides to a checked `Config`, with every mistake placed in its file and line.

Hydra composes and nothing more: no `_target_` of a user's config is ever instantiated.
"""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from tunesmith.train.config import yaml_text
from tunesmith.train.config.config import Config
from tunesmith.train.config.origins import Origins, one_line
from tunesmith.train.config.override_text import hydra_form, typed
from tunesmith.train.config.own_yaml import check_option, check_own_folder, not_yaml
from tunesmith.train.config.suggest import did_you_mean, suggest_key
from tunesmith.train.config.tree import below_raw_key, compose_tree, is_setting, schema_keys
from tunesmith.train.errors import ConfigError, TunesmithError
from tunesmith.train.paths import CONF_DIR, user_path

LONGEST_KEY = 200  # characters: Hydra looks for a file of that name, which the system lets have 255
SEE_DOCS = "docs/config.md lists every setting."
SEARCH_SPACES = "sweep"  # a folder of yaml files that launch/sweep.py reads, not a group of the config


@dataclass
class Composed:
    """A checked config, and the plain tree of values that is written beside the run."""

    config: Config
    resolved: dict[str, Any]
    origins: Origins | None = None  # of its values; None for a config that was read back

    @contextmanager
    def errors_located(self) -> Iterator[None]:
        """Adds file and line to the key of an error that is found while the run uses the config."""
        try:
            yield
        except TunesmithError as error:
            if self.origins and error.at and (error.at in schema_keys() or below_raw_key(error.at)):
                error.at = self.origins.find(error.at)
            raise


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> Composed:
    """Composes the shipped conf/ (and the user's config_dir, searched beside it) with the overrides.

    Raises ConfigError for an unknown key or option, a value of the wrong type, a missing value, or a failed check.
    """
    own = user_path(str(config_dir)).absolute() if config_dir is not None else None
    folders = [CONF_DIR, *([own] if own else [])]
    origins = Origins(list(overrides), folders)
    with _errors_in_our_words(origins):
        if own:
            check_own_folder(own, origins, lambda group: group_options(group, folders))
        _check_overrides(overrides, folders)
        composed = _to_config(compose_tree(overrides, own))
    composed.origins = origins
    return composed


def load_resolved(path: Path) -> Config:
    """The config of a run, from the config.yaml in its folder. Raises ConfigError when it does not fit the schema.

    It was written with every value resolved: a ${...} was added later, and would read the environment of this process.
    """
    with _errors_in_our_words(Origins([], [path.parent])):
        try:
            loaded = yaml_text.omegaconf_of(yaml_text.read_text(path))
        except yaml.YAMLError as error:
            raise not_yaml(error, path) from None
        if interpolation := _first_interpolation(OmegaConf.to_container(loaded)):
            raise ConfigError(
                f"{interpolation!r} is in the config of a run, which holds plain values.",
                at=str(path),
                do="write the value itself.",
            )
        tree = OmegaConf.merge(OmegaConf.structured(Config), loaded)
        return _to_config(tree).config  # type: ignore[arg-type]


def _first_interpolation(value: Any) -> str | None:
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((found for part in parts if (found := _first_interpolation(part))), None)
    return value if isinstance(value, str) and "${" in value else None


def _to_config(tree: DictConfig) -> Composed:
    with open_dict(tree):
        tree.pop("hydra", None)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        names = ", ".join(missing)
        raise ConfigError(f"no value for {names}.", key=missing[0], do=f"add {missing[0]}=<value> to the command.")
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    resolved = OmegaConf.to_container(tree, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    return Composed(config=config, resolved=resolved)  # type: ignore[arg-type]


def _check_overrides(overrides: Sequence[str], folders: list[Path]) -> None:
    """Raises ConfigError for the first override that names no key, no group, or no option of its group."""
    experiments = [text for text in overrides if text.startswith("+exp=")]
    if len(experiments) > 1:
        raise ConfigError(
            f"there are {len(experiments)} experiments.",
            at=f"command line: {' '.join(experiments)}",
            do="keep one, or write +exp=[one,two]: the second changes the first.",
        )
    for text in overrides:
        override = parse_override(text)
        key, at = override.key_or_group, f"command line: {one_line(text)}"
        options = group_options(key, folders)
        if not is_setting(key) and not options:
            raise _unknown_key(key, at, folders)
        if override.is_delete():
            raise ConfigError(f"{key} cannot be removed.", at=at, do=f"give it another value: {key}=<value>.")
        if override.is_sweep_override():
            raise ConfigError(
                f"{text} gives several values to one run.", at=at, do="give one; a list is written [a,b]."
            )
        if is_setting(key) and override.is_add() and not override.is_force_add() and not below_raw_key(key):
            raise ConfigError(f"{key} exists already.", at=at, do=_without_plus(text))
        if options:
            _check_choice(text, override.value(), key, options)


def parse_override(text: str, *, several: bool = False) -> Override:
    """What an override says, in Hydra's grammar and override_text.py's. several: as a sweep reads it.

    Raises ConfigError.
    """
    key, _, value = text.partition("=")
    if len(key) > LONGEST_KEY or max(map(_depth, (key.replace(".", "["), value))) > yaml_text.MAX_DEPTH:
        raise ConfigError(
            f"'{text[:60]}...' has a key of more than {LONGEST_KEY} characters, or is nested more than "
            f"{yaml_text.MAX_DEPTH} deep.",
            at="command line",
            do=SEE_DOCS,
        )
    try:
        override = OverridesParser.create().parse_override(hydra_form(text, several=several))
    except HydraException as error:
        raise ConfigError(
            f"{text!r} is not an override: {_first_line(error)}.",
            at="command line",
            do=f"write key=value; a text with such characters in quotes: {typed(key, value)}.",
        ) from None
    if not override.key_or_group:
        raise ConfigError(f"{text!r} names no setting.", at="command line", do="write key=value.")
    return override


def _depth(text: str) -> int:
    """How deep brackets are opened, at most."""
    return max(itertools.accumulate((letter in "[{(") - (letter in "]})") for letter in text), default=0)


def _without_plus(text: str) -> str:
    return f"write {shlex.quote(text.lstrip('+'))}, without the plus."


def _check_choice(text: str, value: object, group: str, options: list[str]) -> None:
    at = f"command line: {one_line(text)}"
    if group == "exp" and not text.startswith("+"):
        raise ConfigError("an experiment is added, with a plus.", at=at, do=f"write {shlex.quote(f'+{text}')}.")
    if group != "exp" and text.startswith("+"):
        raise ConfigError(f"{group} has an option already.", at=at, do=_without_plus(text))
    if isinstance(value, dict):
        raise ConfigError(
            f"{group} takes one of its options.", at=at, do=f"set its keys one by one: {group}.<key>=<value>."
        )
    for option in value if isinstance(value, list) else [value]:
        check_option(group, option, options, at)


def group_options(group: str, folders: list[Path]) -> list[str]:
    """Names of the yaml files of a config group over all folders; empty when there is no such group."""
    if not group.isidentifier() or group == SEARCH_SPACES:
        return []
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _unknown_key(key: str, at: str, folders: list[Path]) -> ConfigError:
    if key.startswith("hydra"):
        return ConfigError(
            f"Hydra only composes here, so {key} has no effect.",
            at=at,
            do="set output_dir=<folder> for the run folder.",
        )
    if key == SEARCH_SPACES:
        return ConfigError("a search space is for many trainings, not for one.", at=at, do="use launch/sweep.py -m.")
    groups = {path.name for folder in folders for path in folder.iterdir() if any(path.glob("*.yaml"))}
    guess = suggest_key(key, list(dict.fromkeys([*schema_keys(), *sorted(groups)])))
    return ConfigError(f"there is no setting {key!r}.{did_you_mean(guess)}", at=at, do=SEE_DOCS)


@contextmanager
def _errors_in_our_words(origins: Origins) -> Iterator[None]:
    """Turns what Hydra, OmegaConf, yaml and our own checks raise into one ConfigError with its place."""
    try:
        yield
    except ConfigError as error:
        if error.key is not None:
            error.at = origins.find(error.key)
        raise
    except (OmegaConfBaseException, HydraException) as error:
        raise _translated(error, origins) from None
    except yaml.YAMLError as error:
        raise not_yaml(error) from None


def _translated(error: BaseException, origins: Origins) -> ConfigError:
    cause: BaseException = error
    while not getattr(cause, "full_key", None) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    key, keys = getattr(cause, "full_key", None), schema_keys()
    if key and key not in keys and key.split("[")[0] not in keys:
        return _unknown_key(key, origins.find(key), origins.folders)
    if key:
        key = key.split("[")[0]
        broken = isinstance(cause, InterpolationResolutionError)
        do = "write the value, or correct the ${...}." if broken else f"give {type_in_words(keys[key])}."
        return ConfigError(f"{key}: {_first_line(cause)}.", at=origins.find(key), do=do)
    return ConfigError(f"{_first_line(error)}.", at="config", do=SEE_DOCS)


def type_in_words(hint: Any) -> str:
    """What a setting takes, such as `a whole number or null`."""
    arguments = get_args(hint)
    if NoneType in arguments:
        return " or ".join([*(type_in_words(argument) for argument in arguments if argument is not NoneType), "null"])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(option.value) for option in hint)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of texts"}
    return words.get(get_origin(hint) or hint, "key=value pairs")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
