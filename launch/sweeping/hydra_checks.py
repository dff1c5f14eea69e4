"""What a composed config may say to Hydra itself and to its launchers: nothing that would run, or lie elsewhere."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tunesmith.launch.sweeping.settings import GROUP, TARGET
from tunesmith.train.config.schema.cluster import CONSTRAINT, MAX_WORD, MEMORY, NODE_LIST, WORD
from tunesmith.train.errors import ConfigError

JOB_NAME = "tunesmith"
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
LAUNCHERS = {
    "basic": BASIC,
    "submitit_local": f"{SUBMITIT}.LocalLauncher",
    "submitit_slurm": f"{SUBMITIT}.SlurmLauncher",
}
NUMBER = re.compile(r"\d+")
NODES = re.compile(f"{NODE_LIST.pattern}(,{NODE_LIST.pattern})*")
# What a sweep may set of a launcher, and the texts that it takes: they become lines of a script.
LAUNCHER_SETTINGS = {
    **dict.fromkeys(("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"), NUMBER),
    **dict.fromkeys(("cpus_per_gpu", "gpus_per_task", "signal_delay_s", "max_num_timeout"), NUMBER),
    **dict.fromkeys(("name", "partition", "qos", "gres", "account"), WORD),
    **dict.fromkeys(("mem_per_gpu", "mem_per_cpu"), MEMORY),
    "constraint": CONSTRAINT,
    "exclude": NODES,
    "stderr_to_stdout": re.compile("true|false"),
}
# What it may not set, since it would run or do nothing, and the values that submitit's own yaml gives.
LAUNCHER_DEFAULTS: dict[str, Any] = {
    "submitit_folder": "${hydra.sweep.dir}/.submitit/%j",
    "name": "${hydra.job.name}",
    "setup": None,  # shell commands
    "comment": None,
    "additional_parameters": {},
    "array_parallelism": 256,  # each trial is a job by itself: hydra.sweeper.n_jobs
}
# The same of Hydra: folders that it would write to, variables that it would set for a trial.
HYDRA_DEFAULTS: dict[str, Any] = {
    "run": {"dir": "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"},
    "sweep": {"dir": "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "subdir": "${hydra.job.num}"},
    "output_subdir": ".hydra",
    "callbacks": {},
    "job.name": JOB_NAME,
    "job.chdir": None,
    "job.env_set": {},
    "job.env_copy": [],
}
RUNS_A_NAME = {"_target_", "_call_", "_args_", "_partial_", "class", "()"}
# Hydra's own logging, which we do not start.
LOGGING = {
    f"hydra.{part}.handlers.{handler}.class": [kind]
    for part in ("hydra_logging", "job_logging")
    for handler, kind in (("console", "logging.StreamHandler"), ("file", "logging.FileHandler"))
}


def check_composed(composed: DictConfig, locate: Callable[[str], str]) -> None:
    """Raises ConfigError for anything in hydra's node that names something to run, but for the two plugins.

    And for what would lie outside the sweep's folder, or become a line of a job's script. locate: where a key stands.
    """
    tree = OmegaConf.to_container(composed.hydra, resolve=False)
    assert isinstance(tree, dict)
    allowed = {f"{GROUP}._target_": [TARGET, BASIC_SWEEPER], "hydra.launcher._target_": list(LAUNCHERS.values())}
    for path, value in _names(tree, "hydra"):
        if value not in allowed.get(path, LOGGING.get(path, [])):
            raise ConfigError(f"{path}={value!r} names something to run.", at=path, do="take it out.")
    for name, usual in HYDRA_DEFAULTS.items():
        group, _, last = name.rpartition(".")
        if ((tree[group] if group else tree).get(last) or None) != (usual or None):
            raise ConfigError(
                f"hydra.{name} is nothing that a sweep may set.", at=locate(f"hydra.{name}"), do="take it out."
            )
    _check_launcher(tree["launcher"], locate)


def _check_launcher(launcher: dict[str, Any], locate: Callable[[str], str]) -> None:
    for name, value in launcher.items():
        if name == "_target_" or value is None or (name in LAUNCHER_DEFAULTS and value == LAUNCHER_DEFAULTS[name]):
            continue
        at = locate(f"hydra.launcher.{name}")
        if name not in LAUNCHER_SETTINGS:
            raise ConfigError(f"hydra.launcher.{name} is nothing that a sweep may set.", at=at, do="take it out.")
        is_text = isinstance(value, str) and len(value) <= MAX_WORD
        if not isinstance(value, bool | int | float) and not (is_text and LAUNCHER_SETTINGS[name].fullmatch(value)):
            raise ConfigError(
                f"hydra.launcher.{name}={value!r} is nothing that SLURM takes.",
                at=at,
                do="write a number, or letters, digits and _ . : @ + -.",
            )


def _names(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name in RUNS_A_NAME:
                yield f"{path}.{name}", value
            yield from _names(value, f"{path}.{name}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _names(value, f"{path}[{number}]")
