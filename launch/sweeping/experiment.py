"""A trial as an experiment file: what differs from Tunesmith's defaults, so that it runs as +exp=<name>."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from tunesmith.launch.sweeping.plan import OWN_KEYS, Plan
from tunesmith.train.config.compose import compose_config, compose_tree, group_options
from tunesmith.train.files.durable import write_atomically
from tunesmith.train.paths import CONF_DIR

HEAD = "# @package _global_\n"


def write_experiment(plan: Plan, number: int, params: dict[str, Any], name: str, comment: str) -> Path:
    """Writes <sweep>/conf/exp/<name>.yaml, which composes to the config of the trial; returns its path."""
    path = plan.folder / "conf" / "exp" / f"{name}.yaml"
    if path.is_file() and path.read_text(encoding="utf-8").startswith(f"{HEAD}# {comment}\n"):
        return path
    composed = compose_config(plan.space.overrides(params), plan.config_dir)
    assert composed.origins is not None
    wanted = _without_own(composed.resolved)
    listed = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    usual = {group: option for entry in listed if isinstance(entry, dict) for group, option in entry.items()}
    chosen = {group: options[0] for group, options in composed.origins.choices().items() if group in usual}
    chosen = {
        group: option
        for group, option in chosen.items()
        if option != usual[group] and option in group_options(group, [CONF_DIR])
    }
    base = OmegaConf.to_container(
        compose_tree([f"{group}={option}" for group, option in chosen.items()]), enum_to_str=True
    )
    assert isinstance(base, dict)
    tree: dict[str, Any] = {}
    if chosen:
        tree["defaults"] = [{f"override /{group}": option} for group, option in chosen.items()] + ["_self_"]
    tree |= {"name": name} | _differences(wanted, base)
    text = f"{HEAD}# {comment}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def _without_own(resolved: dict[str, Any]) -> dict[str, Any]:
    """A config without what is each run's own."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in resolved.items()}
    for key in OWN_KEYS:
        group, _, name = key.rpartition(".")
        (tree[group] if group else tree).pop(name, None)
    return tree


def _differences(wanted: dict[str, Any], base: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        there = base.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            if inner := _differences(value, there):
                found[key] = inner
        elif key not in base or value != there:
            found[key] = value
    return found
