"""The best trials as experiment files: what differs from Tunesmith's defaults, so that each runs as +exp=<name>."""

import shlex
from typing import Any

import yaml
from omegaconf import OmegaConf

from tunesmith.launch.sweeping.plan import OWN_KEYS, SweepPlan
from tunesmith.launch.sweeping.result import SweepResult
from tunesmith.train.config.compose import compose_config, group_options
from tunesmith.train.config.tree import compose_tree
from tunesmith.train.files.durable import write_atomically
from tunesmith.train.paths import CONF_DIR
from tunesmith.train.track.console import figure

HEAD = "# @package _global_\n"


def write_experiments(plan: SweepPlan, result: SweepResult) -> None:
    """Writes <sweep>/conf/exp/<name>.yaml for each of the best trials, and removes those that were it for a while."""
    folder = plan.folder / "conf" / "exp"
    names = {experiment_name(plan, number) for number in result.best}
    for path in folder.glob("*.yaml"):
        if path.stem not in names:
            path.unlink()
    for row in result.rows:
        if row.number in result.best and row.values:  # none: another driver runs it again
            name = experiment_name(plan, row.number)
            pairs = zip(result.metrics, row.values, strict=True)
            values = ", ".join(f"{metric} {figure(metric, value)}" for metric, value in pairs)
            head = f"{HEAD}# Trial {row.number} of the sweep {result.name}: {values}.\n"
            path = folder / f"{name}.yaml"
            if not path.is_file() or not path.read_text(encoding="utf-8").startswith(head):
                tree = experiment(plan, row.params, name)
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, f"{head}{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}".encode())


def experiment_name(plan: SweepPlan, number: int) -> str:
    """<sweep>; of a Pareto set <sweep>-<trial>."""
    return plan.study_name if len(plan.settings.metrics) == 1 else f"{plan.study_name}-{number}"


def experiment_commands(plan: SweepPlan, numbers: list[int]) -> dict[int, str]:
    """The commands that run trials of the best ones again."""
    folder = shlex.quote(str(plan.folder / "conf"))
    return {
        number: f"deepspeed launch/train.py +exp={experiment_name(plan, number)} --config-dir {folder}"
        for number in numbers
    }


def experiment(plan: SweepPlan, params: dict[str, Any], name: str) -> dict[str, Any]:
    """The tree of a file that composes to the config of a trial."""
    composed = compose_config(plan.space.overrides(params), plan.config_dir)
    assert composed.origins is not None
    listed = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    usual = {group: option for entry in listed if isinstance(entry, dict) for group, option in entry.items()}
    chosen = {
        group: options[0]
        for group, options in composed.origins.choices().items()
        if group in usual and options[0] != usual[group] and options[0] in group_options(group, [CONF_DIR])
    }
    base = compose_tree([f"{group}={option}" for group, option in chosen.items()])
    tree: dict[str, Any] = {}
    if chosen:
        tree["defaults"] = [{f"override /{group}": option} for group, option in chosen.items()] + ["_self_"]
    tree["name"] = name
    return tree | _differences(composed.resolved, OmegaConf.to_container(base, enum_to_str=True))


def _differences(wanted: dict[str, Any], base: Any, prefix: str = "") -> dict[str, Any]:
    """What is not each run's own, and is not so in the base."""
    different: dict[str, Any] = {}
    for key, value in wanted.items():
        there = base.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            if inner := _differences(value, there, f"{prefix}{key}."):
                different[key] = inner
        elif f"{prefix}{key}" not in OWN_KEYS and (key not in base or value != there):
            different[key] = value
    return different
