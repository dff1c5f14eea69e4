"""What Hydra makes of the yaml files and overrides, before it is checked.

Hydra takes a tenth of a second for a config, most of it for the choices of groups. Trials of a sweep differ in settings
alone, so the tree of the choices is kept, and settings are put on a copy of it.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tunesmith.train.config.config import Config
from tunesmith.train.config.override_text import hydra_form, quoted
from tunesmith.train.config.own_yaml import OwnFiles
from tunesmith.train.paths import CONF_DIR

RAW_KEYS = ("engine.deepspeed", "objective.settings")  # any key may be set below them


@cache
def schema_keys(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type, groups included."""
    hints = get_type_hints(schema)
    keys: dict[str, Any] = {}
    for field in fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        keys[key] = hint
        if is_dataclass(hint):
            keys |= schema_keys(hint, f"{key}.")  # type: ignore[arg-type]
    return keys


def compose_tree(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """What Hydra makes of the yaml files and overrides; values that are still missing read ???."""
    arguments = [hydra_form(admit_raw_key(override)) for override in overrides]
    if config_dir:
        Plugins.instance().register(OwnFiles)
        return _composed([*arguments, f"hydra.searchpath=[{quoted(f'{OwnFiles.scheme()}://{config_dir}')}]"])
    try:
        parsed = [OverridesParser.create().parse_override(text) for text in arguments]
        if all(map(_is_choice_or_setting, parsed)):
            choices = tuple(text for text, it in zip(arguments, parsed, strict=True) if not is_setting(it.key_or_group))
            tree = deepcopy(_shipped_tree(choices, _shipped_files()))
            for it in parsed:
                if is_setting(it.key_or_group):
                    forced = it.is_force_add()
                    OmegaConf.update(tree, it.key_or_group, it.value(), merge=True, force_add=forced)
            return tree
    except (OmegaConfBaseException, HydraException, OSError):
        pass
    return _composed(arguments)  # which also says what is wrong, and of which override


def _is_choice_or_setting(override: Override) -> bool:
    """Whether it is a plain option of a group, or a plain value of a setting."""
    if override.package is not None or override.is_delete() or override.is_sweep_override():
        return False
    if is_setting(override.key_or_group):
        return not override.is_add() or override.is_force_add()
    return not isinstance(override.value(), dict)


@lru_cache(maxsize=32)
def _shipped_tree(choices: tuple[str, ...], files: tuple[tuple[str, int], ...]) -> DictConfig:
    return _composed(choices)


def _shipped_files() -> tuple[tuple[str, int], ...]:
    """The yaml files of the shipped conf/ and when each was last written."""
    return tuple((str(path), path.stat().st_mtime_ns) for path in sorted(CONF_DIR.rglob("*.yaml")))


def _composed(arguments: Sequence[str]) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=Config)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3", job_name="tunesmith"):
        return compose("config", list(arguments))


def is_setting(key: str) -> bool:
    """Whether a key has a value of its own, and is no group of settings."""
    return below_raw_key(key) or (key in schema_keys() and not is_dataclass(schema_keys()[key]))


def admit_raw_key(override: str) -> str:
    """`engine.deepspeed.a.b=1` adds a key that the schema does not list, for which Hydra wants ++."""
    is_raw = below_raw_key(override) or override.startswith(tuple(f"{key}={{" for key in RAW_KEYS))
    return f"++{override}" if is_raw else override


def below_raw_key(key: str) -> bool:
    """Whether a key is below one of RAW_KEYS."""
    return key.startswith(tuple(f"{raw_key}." for raw_key in RAW_KEYS))
