"""Trials through a launcher of Hydra, such as submitit_slurm: each is a job that trains by the ordinary launcher.

Hydra hands out jobs and takes back what they return, no more. So a job is asked to stop through a file in the sweep's
folder, which it looks at. With cluster=slurm and no launcher the trials are Tunesmith's own jobs, which requeue
themselves; that is the better choice where both are to be had.
"""

import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from tunesmith.launch.sweeping.places import Ended, free_port, supervised, training_command, trial_environment
from tunesmith.launch.sweeping.plan import Plan, num_gpus
from tunesmith.train.config.compose import admit_raw_key
from tunesmith.train.config.config import Device
from tunesmith.train.errors import EXIT_STOPPED, ConfigError, TrainingError

STOP = "stop"  # a file claims/<number>.stop asks a job to save and end
LOOK_SECONDS = 0.5
ONE_NODE = ("nodes", "tasks_per_node")


def train_trial(config: DictConfig) -> dict[str, Any]:
    """Hydra's task function: trains one trial, in whatever job the launcher has made for it.

    Returns the exit code of the training, and the objective: the values of hydra.sweeper.metric, None where it failed.
    """
    from tunesmith.launch.sweeping.outcome import outcome_of

    hydra = HydraConfig.get()
    run_dir = Path(str(config.output_dir))
    sweep, number = run_dir.parents[1], run_dir.name
    device = Device(config.cluster.device)
    ranks = hydra.sweeper.ranks_per_trial or max(1, num_gpus(device))
    port = free_port()
    overrides = [str(text) for text in hydra.overrides.task]
    command = training_command(ranks, searched_folder(hydra.searchpath), overrides, gpus=[], port=port)
    was_stopped = False
    with (sweep / "logs" / f"trial-{number}.log").open("ab") as log:
        process = subprocess.Popen(
            supervised(command), stdout=log, stderr=subprocess.STDOUT, env=trial_environment(port)
        )
        while process.poll() is None:
            if (sweep / "claims" / f"{number}.{STOP}").exists():
                process.terminate()
                process.wait()
                was_stopped = True
            time.sleep(LOOK_SECONDS)
    code = EXIT_STOPPED if was_stopped and process.returncode < 0 else process.returncode  # as LocalAttempt has it
    metric = OmegaConf.to_container(hydra.sweeper).get("metric")  # type: ignore[union-attr]
    metrics = metric if isinstance(metric, list) else [str(metric)]
    outcome = outcome_of(run_dir, None, code, metrics)
    return {"code": code, "objective": outcome.values}


def searched_folder(searchpath: Any) -> Path | None:
    """The user's own folder of yaml files, from hydra.searchpath."""
    return Path(str(searchpath[0]).removeprefix("file://")) if searchpath else None


@dataclass
class LauncherAttempt:
    """A job of Hydra's launcher, waited for in a thread."""

    launcher: Launcher
    overrides: list[str]
    number: int
    stop_file: Path
    code: int | None = None
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.stop_file.unlink(missing_ok=True)
        self.thread = threading.Thread(target=self._work, name=f"trial-{self.number}", daemon=True)
        self.thread.start()

    def poll(self) -> Ended | None:
        if self.thread.is_alive():
            return None
        self.stop_file.unlink(missing_ok=True)
        return Ended(1 if self.error is not None else self.code)

    def stop(self) -> None:
        self.stop_file.touch()

    def described(self) -> str:
        return f"by {type(self.launcher).__name__}"

    def _work(self) -> None:
        try:
            [done] = self.launcher.launch([self.overrides], initial_job_idx=self.number)
            if done.status is not JobStatus.COMPLETED:
                raise TrainingError("the job of Hydra's launcher failed.") from done._return_value
            self.code = int(done.return_value["code"])
        except BaseException as error:  # of submitit, SLURM, or the job: the trial has failed, the sweep goes on
            self.error = error


class HydraJobs:
    """n_jobs trials at a time through Hydra's launcher."""

    def __init__(self, plan: Plan, launcher: Launcher, settings: DictConfig) -> None:
        for name in ONE_NODE:
            if settings.get(name, 1) != 1:
                raise ConfigError(
                    f"a trial by Hydra's launcher is one task on one node, not {name}={settings.get(name)}.",
                    at=f"hydra.launcher.{name}",
                    do="set hydra.sweeper.ranks_per_trial, or use cluster=slurm without hydra/launcher.",
                )
        self._plan, self._launcher = plan, launcher
        self._running: list[LauncherAttempt] = []

    def has_room(self) -> bool:
        self._running = [attempt for attempt in self._running if attempt.thread.is_alive()]
        return len(self._running) < self._plan.settings.n_jobs

    def start(self, number: int, overrides: list[str], job_id: str | None) -> LauncherAttempt:
        attempt = LauncherAttempt(
            self._launcher,
            [admit_raw_key(text) for text in overrides],
            number,
            self._plan.folder / "claims" / f"{number}.{STOP}",
        )
        self._running.append(attempt)
        return attempt
