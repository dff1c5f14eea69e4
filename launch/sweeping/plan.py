"""A sweep as it was asked for: what is searched, how, where; refused before the first trial when it cannot work."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunesmith.launch.sweeping.settings import DEFAULT_TRIALS, GROUP, Pruner, Sampler, SweeperConfig, mistake
from tunesmith.launch.sweeping.space import Space, read_space
from tunesmith.launch.typed_secrets import is_secret, refuse_secrets
from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import ClusterKind, Config, Device
from tunesmith.train.config.override_text import quoted
from tunesmith.train.errors import ConfigError
from tunesmith.train.files.durable import write_atomically
from tunesmith.train.paths import CONF_DIR, user_path

DEFINITION = "definition.json"  # in the sweep's folder: what is searched, which a second command must share
LONGEST_NAME = 80  # characters of the run's name in those of its trials and of the sweep; a name has at most 100
FOLDERS = ("trials", "logs", "claims")
OWN_KEYS = ("output_dir", "name", "track.group")  # of each trial; what the user gives is the sweep's


@dataclass(frozen=True)
class SweepPlan:
    """What a driver works from."""

    settings: SweeperConfig
    space: Space
    config: Config  # of the first combination
    config_dir: Path | None
    num_gpus: int  # of this machine that may be used
    is_grouped: bool  # the user has named a W&B group

    @cached_property
    def study_name(self) -> str:
        if self.settings.study_name:
            return self.settings.study_name
        words = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.config.name)[:LONGEST_NAME]  # it becomes +exp=<name>
        digest = hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()
        return f"{words}-{digest[:8]}"

    @property
    def definition(self) -> dict[str, Any]:
        """What makes trials of two commands trials of one sweep."""
        return {
            "overrides": sorted(self.space.fixed),
            "space": self.space.described(),
            "metrics": self.settings.metrics,
            "directions": self.settings.directions,
            "sampler": self.settings.sampler.value,
            "seed": self.settings.seed,
        }

    @cached_property
    def folder(self) -> Path:
        given = self.config.output_dir
        return user_path(given).absolute() if given else Path("runs", self.study_name).absolute()

    @property
    def claims(self) -> Path:
        """The folder of the locks."""
        return self.folder / "claims"

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def log(self, number: int) -> Path:
        return self.folder / "logs" / f"trial-{number}.log"

    @property
    def num_trials(self) -> int:
        """Trials in all, or fewer where the grid has fewer points."""
        listed, wanted = self.space.size, self.settings.n_trials
        if listed is None:
            return wanted or DEFAULT_TRIALS
        return min(wanted or (listed if self.settings.sampler is Sampler.grid else DEFAULT_TRIALS), listed)

    @property
    def is_slurm(self) -> bool:
        return self.config.cluster.kind is ClusterKind.slurm

    @property
    def ranks(self) -> int:
        """Of each trial."""
        if self.is_slurm:
            return self.config.cluster.nodes * self.config.cluster.ranks_per_node
        return self.settings.ranks_per_trial or max(1, self.num_gpus // self.settings.n_jobs)

    @property
    def gpus(self) -> int:
        """Of each trial, which the budget of GPU-hours counts."""
        if self.is_slurm:
            return self.config.cluster.nodes * (self.config.cluster.gpus_per_node or 0)
        return self.ranks if self.num_gpus else 0

    def overrides(self, number: int, point: dict[str, Any]) -> list[str]:
        """Of one trial, its folder and names included."""
        name = f"{self.config.name[:LONGEST_NAME]}-{number}"
        own = [f"output_dir={quoted(str(self.trial_folder(number)))}", f"name={quoted(name)}"]
        group = [] if self.is_grouped else [f"track.group={quoted(self.study_name)}"]
        return [*self.space.overrides(point), *own, *group]


def make_plan(settings: SweeperConfig, overrides: Sequence[str], config_dir: Path | None) -> SweepPlan:
    """Raises ConfigError for overrides that do not compose, an empty space, or settings that do not fit it."""
    refuse_secrets((f"{key}={value}" for key, value in settings.params.items()), f"{GROUP}.params")
    space = read_space(settings.params, overrides, [CONF_DIR, *([config_dir] if config_dir else [])])
    for key in OWN_KEYS:
        if key in (name.lstrip("+") for name in space.dimensions):
            raise ConfigError(f"{key} is each trial's own.", at=f"command line: {key}=...", do="search something else.")
    if settings.sampler is Sampler.grid and (keys := space.intervals()):
        raise ConfigError(
            f"a grid has no end on the interval of {keys[0]}.",
            at=f"{GROUP}.sampler",
            do="choose hydra/sweeper=optuna or random, or give values: a,b,c.",
        )
    first, last = [compose_config(space.overrides(point), config_dir).config for point in space.corners()]
    for config in (first, last):
        _check_metrics(settings, config)
    _check_names(first)
    fixed = {text: text.lstrip("+").split("=", 1)[0] for text in space.fixed}
    plan = SweepPlan(
        settings=settings,
        space=replace(space, fixed=tuple(text for text, key in fixed.items() if key != "output_dir")),
        config=first,
        config_dir=config_dir,
        num_gpus=0 if first.cluster.kind is ClusterKind.slurm else num_gpus(first.cluster.device),
        is_grouped="track.group" in fixed.values(),
    )
    _check_ranks(plan)
    return plan


def _check_names(config: Config) -> None:
    """They become the names of files, and of what a scheduler is given."""
    for key, value in (("name", config.name), ("output_dir", config.output_dir or "")):
        if is_secret(value):
            raise ConfigError(f"{key} holds a secret, and a sweep writes it down.", key=key, do="take it out.")
        if not value.isprintable():
            raise ConfigError(f"{value!r} cannot name a folder.", key=key, do="use characters that can be seen.")


def _check_metrics(settings: SweeperConfig, config: Config) -> None:
    for metric in settings.metrics:
        if metric.startswith("eval/") and not (config.data.validation_sources or config.data.validation_fraction):
            what = f"{metric} needs validation records, and a trial has none."
            raise mistake("metric", what, "set data.validation or data.validation_fraction, or another metric.")
        if metric in ("eval/exact_match", "eval/rouge_l") and not config.evaluate.generate:
            what = f"{metric} needs answers, and evaluate.generate is false."
            raise mistake("metric", what, "set evaluate.generate=true, or another metric.")
    if settings.pruner is not Pruner.none and settings.metrics == ["eval/loss"] and not config.evaluate.every_steps:
        what = f"pruner={settings.pruner} needs evaluations to judge by."
        raise mistake("pruner", what, "set evaluate.every_steps, or pruner=none.")


def _check_ranks(plan: SweepPlan) -> None:
    settings = plan.settings
    if settings.max_gpu_hours is not None and plan.gpus == 0:
        what = "the trials use no GPU, so GPU-hours are no limit."
        raise mistake("max_gpu_hours", what, "set hydra.sweeper.max_hours.")
    if plan.is_slurm and settings.ranks_per_trial is not None:
        what = "the ranks of a SLURM job are cluster.nodes x cluster.tasks_per_node."
        raise mistake("ranks_per_trial", what, "leave it out.")
    wanted = settings.n_jobs * plan.ranks
    if plan.num_gpus and wanted > plan.num_gpus:
        name = "ranks_per_trial" if settings.ranks_per_trial else "n_jobs"
        what = f"{settings.n_jobs} trials of {plan.ranks} ranks need {wanted} GPUs, and there are {plan.num_gpus}."
        raise mistake(name, what, "lower hydra.sweeper.n_jobs or hydra.sweeper.ranks_per_trial.")


def num_gpus(device: Device) -> int:
    """GPUs that trainings of this command may use."""
    if device is Device.cpu or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    import torch

    return torch.cuda.device_count()


def claim_folder(plan: SweepPlan) -> None:
    """Makes the sweep's folder. Raises ConfigError when it holds another sweep, or something else."""
    path = plan.folder / DEFINITION
    if not path.is_file() and plan.folder.is_dir() and {one.name for one in plan.folder.iterdir()} - set(FOLDERS):
        raise ConfigError(f"{plan.folder} is not empty and holds no sweep.", at="output_dir", do="choose another.")
    try:
        for name in FOLDERS:
            (plan.folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the sweep's folder cannot be made: {error.strerror}.", at=f"output_dir ({plan.folder})"
        ) from None
    wanted = plan.definition | {"study_name": plan.study_name}
    with FileLock(plan.claims / "study.lock"):
        if path.is_file():
            _check_same(plan.folder, _read_definition(path), wanted)
        else:
            write_atomically(path, json.dumps(wanted, indent=2).encode() + b"\n")


def _read_definition(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ConfigError(
            "what the sweep searches cannot be read.", at=str(path), do="restore it, or choose another output_dir."
        ) from None


def _check_same(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    what = next((name for name in wanted if there.get(name) != wanted[name]), None)
    if what is not None:
        raise ConfigError(
            f"{folder} holds a sweep of another {what}: {there.get(what)}.",
            at=str(folder / DEFINITION),
            do="give the same command, or another hydra.sweeper.study_name and output_dir.",
        )
