"""From yaml files and command-line overrides to a checked `Config`, with every mistake placed in its file and line.

Hydra composes and nothing more: no `_target_` of a user's config is ever instantiated.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tunesmith.train.config import Config
from tunesmith.train.errors import ConfigError

CONF_DIR = Path(__file__).absolute().parent.parent / "conf"
RAW_KEY = "engine.deepspeed"  # everything below it is DeepSpeed's own language


@dataclass
class Composed:
    """A checked config, and the plain tree of values that is written beside the run."""

    config: Config
    resolved: dict[str, Any]


def schema_keys(schema: type = Config, prefix: str = "") -> dict[str, type]:
    """Every dotted key of the schema with its type, groups included."""
    hints = get_type_hints(schema)
    keys: dict[str, type] = {}
    for field in fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        keys[key] = hint
        if is_dataclass(hint):
            keys |= schema_keys(hint, f"{key}.")  # type: ignore[arg-type]
    return keys


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> Composed:
    """Composes the shipped conf/ (and the user's config_dir, searched beside it) with the overrides.

    Raises ConfigError for an unknown key or option, a value of the wrong type, a missing value, or a failed check.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(
            f"there is no folder {config_dir}.", at="--config-dir", do="give the folder with your yaml files."
        )
    folders = [CONF_DIR, *([config_dir.absolute()] if config_dir else [])]
    _check_overrides(overrides, folders)
    ConfigStore.instance().store(name="schema", node=Config)
    arguments = [_admit_raw_key(override) for override in overrides]
    if config_dir:
        arguments.append(f"hydra.searchpath=['file://{config_dir.absolute()}']")
    with _errors_in_our_words(Places(list(overrides), folders)):
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3", job_name="tunesmith"):
            composed = compose("config", arguments, return_hydra_config=True)
    places = Places(list(overrides), folders, dict(composed.hydra.runtime.choices))
    with _errors_in_our_words(places):
        return _to_config(composed)


def load_resolved(path: Path) -> Config:
    """The config of a run from the config.yaml beside it. Raises ConfigError when it does not fit the schema."""
    with _errors_in_our_words(Places([], [path.parent])):
        tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        return _to_config(tree).config  # type: ignore[arg-type]


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


def _admit_raw_key(override: str) -> str:
    """`engine.deepspeed.a.b=1` adds a key that our schema does not list, which Hydra wants said with ++."""
    return f"++{override}" if override.startswith(f"{RAW_KEY}.") else override


def _check_overrides(overrides: Sequence[str], folders: list[Path]) -> None:
    """Raises ConfigError for the first override that names no key, no group, or no option of its group."""
    keys = schema_keys()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"{text!r} is not an override: {_first_line(error)}",
                at="command line",
                do="write key=value, quoted for the shell.",
            ) from None
        key = override.key_or_group
        if key.startswith((f"{RAW_KEY}.", "hydra.")) or (key in keys and not is_dataclass(keys[key])):
            continue
        options = group_options(key, folders)
        if not options:
            raise _unknown_key(key, "command line", folders)
        _check_option(override, options)


def _check_option(override: Override, options: list[str]) -> None:
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    for option in chosen:
        if isinstance(option, str) and option in options:
            continue
        raise ConfigError(
            f"{override.key_or_group} has no option {option!r}.{_nearest(str(option), options)}",
            at="command line",
            do=f"choose one of {', '.join(options)}.",
        )


def group_options(group: str, folders: list[Path]) -> list[str]:
    """Names of the yaml files of a config group over all folders; empty when there is no such group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _unknown_key(key: str, at: str, folders: list[Path]) -> ConfigError:
    known = list(schema_keys())
    groups = [
        path.name for folder in folders for path in folder.iterdir() if path.is_dir() and any(path.glob("*.yaml"))
    ]
    guess = _nearest(key, known + groups)
    if not guess:  # `learning_rate` without its group
        same = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        guess = f" Did you mean {same[0]}?" if same else _nearest_leaf(key, known)
    return ConfigError(f"there is no setting {key!r}.{guess}", at=at, do="docs/config.md lists every setting.")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _nearest_leaf(key: str, known: list[str]) -> str:
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.6)
    return f" Did you mean {leaves[close[0]]}?" if close else ""


@dataclass
class Places:
    """Where a key got its value: the command line first, then the yaml files from the most specific down."""

    overrides: list[str]
    folders: list[Path]
    choices: dict[str, Any] | None = None

    def find(self, key: str) -> str:
        for override in reversed(self.overrides):
            if override.lstrip("+~").split("=", 1)[0] == key:
                return f"{key} (command line: {override})"
        group, _, inner = key.partition(".")
        for path, path_key in self._candidates(group, inner, key):
            line = line_of_key(path, path_key.split("."))
            if line:
                return f"{key} ({_shown(path)}:{line})"
        return key

    def _candidates(self, group: str, inner: str, key: str) -> Iterator[tuple[Path, str]]:
        choices = self.choices or {}
        for folder in reversed(self.folders):
            for name in _experiments(choices, self.overrides):
                yield folder / "exp" / f"{name}.yaml", key
            if inner and choices.get(group):
                yield folder / group / f"{choices[group]}.yaml", inner
            yield folder / "config.yaml", key


def _experiments(choices: dict[str, Any], overrides: list[str]) -> list[str]:
    named = [text.split("=", 1)[1] for text in overrides if text.lstrip("+").startswith("exp=")]
    chosen = [str(value) for group, value in choices.items() if group == "exp"]
    return list(dict.fromkeys(named + chosen))


def line_of_key(path: Path, keys: list[str]) -> int | None:
    """Line of a nested key in a yaml file, counted from 1; None when it does not stand there."""
    if not path.is_file():
        return None
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = None
    for name in keys:
        if not isinstance(node, yaml.MappingNode):
            return None
        pairs = {key.value: (key, value) for key, value in node.value}
        if name not in pairs:
            return None
        line, node = pairs[name][0].start_mark.line + 1, pairs[name][1]
    return line


def _shown(path: Path) -> str:
    if path.is_relative_to(CONF_DIR):
        return f"conf/{path.relative_to(CONF_DIR)}"
    return str(path)


@contextmanager
def _errors_in_our_words(places: Places) -> Iterator[None]:
    """Turns what Hydra, OmegaConf, yaml and our own checks raise into one ConfigError with its place."""
    try:
        yield
    except ConfigError as error:
        if error.key is not None:
            error.at = places.find(error.key)
        raise
    except (OmegaConfBaseException, HydraException) as error:
        raise _translated(error, places) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid yaml: {' '.join(str(error).split())}", at="config files") from None


def _translated(error: BaseException, places: Places) -> ConfigError:
    cause: BaseException = error
    while not getattr(cause, "full_key", None) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    key = getattr(cause, "full_key", None)
    if key and key not in schema_keys():
        return _unknown_key(key, places.find(key), places.folders)
    if key:
        return ConfigError(f"{_first_line(cause)}.", at=places.find(key), do="docs/config.md says what fits.")
    return ConfigError(_first_line(error), at="config", do="docs/config.md lists every setting.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
