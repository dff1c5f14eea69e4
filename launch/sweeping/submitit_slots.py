"""Trials through submitit, as hydra/launcher=submitit_slurm or submitit_local says: jobs of one node each.

submitit hands out jobs and takes back what they return, no more. So a job is asked to stop through a file in the
sweep's folder, which it looks at. With cluster=slurm and no launcher the trials are Tunesmith's own jobs, which requeue
themselves; that is the better choice where there is SLURM.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import yaml

from tunesmith.launch.environment import free_port
from tunesmith.launch.sweeping.plan import SweepPlan, num_gpus
from tunesmith.launch.sweeping.slots import (
    Slots,
    code_of,
    start_training,
    training_command,
    trial_environment,
)
from tunesmith.train.config import yaml_text
from tunesmith.train.config.config import Device
from tunesmith.train.config.origins import line_of_key, one_line, shown
from tunesmith.train.config.own_yaml import not_yaml
from tunesmith.train.config.schema.cluster import CONSTRAINT, MAX_WORD, MEMORY, NODE_LIST, WORD
from tunesmith.train.config.suggest import did_you_mean, nearest
from tunesmith.train.errors import ConfigError, TrainingError

LOOK_SECONDS = 0.5
GROUP = "hydra.launcher"
# The options of hydra/launcher, and what Hydra's plugin for submitit calls them; basic: none.
LAUNCHERS = {"basic": "", "submitit_local": "LocalLauncher", "submitit_slurm": "SlurmLauncher"}
TARGET = "hydra_plugins.hydra_submitit_launcher.submitit_launcher."
NUMBER = re.compile(r"\d+")
FLAG = re.compile("true|false")
NODES = re.compile(f"{NODE_LIST.pattern}(,{NODE_LIST.pattern})*")
# What may be set, and the texts that are taken: they become lines of a script.
SETTINGS = {
    **dict.fromkeys(("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"), NUMBER),
    "name": WORD,
    "stderr_to_stdout": FLAG,
}
SLURM_SETTINGS = {
    **dict.fromkeys(("cpus_per_gpu", "gpus_per_task", "signal_delay_s", "max_num_timeout"), NUMBER),
    **dict.fromkeys(("partition", "qos", "gres", "account"), WORD),
    **dict.fromkeys(("mem_per_gpu", "mem_per_cpu"), MEMORY),
    "constraint": CONSTRAINT,
    "exclude": NODES,
}
KNOWN = {"basic": {}, "submitit_local": SETTINGS, "submitit_slurm": SETTINGS | SLURM_SETTINGS}
DEFAULTS = {"name": "tunesmith", "timeout_min": 60, "signal_delay_s": 120, "max_num_timeout": 0}  # of Hydra's plugin


def launcher_settings(launcher: str, typed: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """What submitit is to be told. Raises ConfigError for a setting that is not listed, or that SLURM would not take.

    Args:
        typed: hydra.launcher.<name> of the command line, which has the last word.
        folders: of yaml files; hydra/launcher/<launcher>.yaml in them.
    """
    known = KNOWN[launcher]
    settings: dict[str, Any] = {}
    for name, value, at in [*_in_yaml(launcher, folders), *((*one, "command line") for one in typed.items())]:
        if name not in known:
            guess = did_you_mean(nearest(name, list(known)))
            listed = f"choose one of {', '.join(known)}." if known else "choose hydra/launcher=submitit_slurm."
            raise ConfigError(f"{GROUP} has no setting {name!r}.{guess}", at=f"{GROUP}.{name} ({at})", do=listed)
        if value is None:
            settings.pop(name, None)
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if not (isinstance(value, str | int) and len(text) <= MAX_WORD and known[name].fullmatch(text)):
            raise ConfigError(
                f"{GROUP}.{name}={one_line(text)!r} is nothing that SLURM takes.",
                at=f"{GROUP}.{name} ({at})",
                do="write a number, or letters, digits and _ . : @ + -.",
            )
        if name in ("nodes", "tasks_per_node") and text != "1":
            raise ConfigError(
                f"a trial by Hydra's launcher is one task on one node, not {name}={text}.",
                at=f"{GROUP}.{name} ({at})",
                do="set hydra.sweeper.ranks_per_trial, or use cluster=slurm without hydra/launcher.",
            )
        settings[name] = int(text) if known[name] is NUMBER else text == "true" if known[name] is FLAG else text
    return DEFAULTS | settings


def _in_yaml(launcher: str, folders: Sequence[Path]) -> Iterator[tuple[str, Any, str]]:
    """The settings of a person's own hydra/launcher/<launcher>.yaml, and where each stands."""
    for path in (folder / "hydra" / "launcher" / f"{launcher}.yaml" for folder in folders):
        try:
            tree = yaml_text.tree_of(yaml_text.read_text(path)) if path.is_file() else {}
        except yaml.YAMLError as error:
            raise not_yaml(error, path) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the file can't be read: {error}.", at=shown(path)) from None
        if not isinstance(tree, dict):
            raise ConfigError("the file holds no settings.", at=f"{shown(path)}:1", do="write `key: value` lines.")
        for name, value in tree.items():
            if name != "_target_" or value != TARGET + LAUNCHERS[launcher]:
                yield str(name), value, f"{shown(path)}:{line_of_key(path, [str(name)])}"


@dataclass(frozen=True)
class TrialJob:
    """What a job does: it trains one trial by the ordinary launcher, and returns the exit code of the training."""

    overrides: list[str]
    config_dir: Path | None
    log: Path
    stop_file: Path  # asks it to save and end
    ranks: int | None  # None: the GPUs that the job has
    device: Device

    def __call__(self) -> int:
        port, ranks = free_port(), self.ranks or max(1, num_gpus(self.device))
        command = training_command(ranks, self.config_dir, self.overrides, gpus=[], port=port)
        process = start_training(command, self.log, trial_environment(port))
        while process.poll() is None and not self.stop_file.exists():
            time.sleep(LOOK_SECONDS)
        is_asked = process.poll() is None
        if is_asked:
            process.terminate()
            process.wait()
        return code_of(process, was_asked=is_asked)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit submits again when the job is preempted, or reaches its time limit."""
        return submitit.helpers.DelayedSubmission(self)


@dataclass
class SubmititTrial:
    """A job of submitit."""

    job: submitit.Job[int]
    stop_file: Path
    launcher: str

    def has_ended(self) -> bool:
        return self.job.done()

    def exit_code(self) -> int:
        self.stop_file.unlink(missing_ok=True)
        try:
            return self.job.result()
        except Exception:  # of submitit, SLURM, or the job: the trial has failed, the sweep goes on
            return 1

    def stop(self) -> None:
        self.stop_file.touch()

    def described(self) -> str:
        return f"by {LAUNCHERS[self.launcher]}"


class SubmititSlots(Slots):
    """Trials through submitit."""

    def __init__(self, plan: SweepPlan, launcher: str, settings: Mapping[str, Any]) -> None:
        self._plan, self._launcher = plan, launcher
        self._settings = {f"slurm_{name}" if name in SLURM_SETTINGS else name: one for name, one in settings.items()}
        self._at_first = {"slurm_max_num_timeout": self._settings.pop("slurm_max_num_timeout")}

    def start(self, number: int, overrides: list[str], job_id: str | None) -> SubmititTrial:
        plan, stop_file = self._plan, self._plan.claims / f"{number}.stop"
        stop_file.unlink(missing_ok=True)
        ranks, device = plan.settings.ranks_per_trial, plan.config.cluster.device
        cluster = self._launcher.removeprefix("submitit_")
        try:
            executor = submitit.AutoExecutor(plan.folder / "hydra/.submitit/%j", cluster=cluster, **self._at_first)
            executor.update_parameters(**self._settings)
            job = executor.submit(TrialJob(overrides, plan.config_dir, plan.log(number), stop_file, ranks, device))
        except Exception as error:  # of submitit or SLURM: the trial has failed, the sweep goes on
            raise TrainingError(
                f"submitit has not taken the job: {(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from None
        return SubmititTrial(job, stop_file, self._launcher)
