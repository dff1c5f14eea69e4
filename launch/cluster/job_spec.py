"""What a job needs to know of its run, as arguments in the script that is submitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.train.errors import ConfigError

FOLDER = "job"  # in the run folder


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One run as a job. The names are those of cluster.*."""

    run_dir: Path
    overrides: list[str]  # of launch/train.py, as they were typed, without output_dir
    config_dir: Path | None = None
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    cpu_bind: str = "cores"
    exclude: tuple[str, ...] = ()
    preflight: bool = True
    max_restarts: int = 100
    no_progress: int = 3
    container: str | None = None
    container_runtime: str = "apptainer"
    container_mounts: tuple[str, ...] = ()
    container_python: str = "python3"

    @property
    def job_dir(self) -> Path:
        """What the job leaves behind; job_folder.py says what is in it."""
        return self.run_dir / FOLDER

    def log_dir(self, restart: int) -> Path:
        """The logs of the ranks of one start."""
        return self.job_dir / "logs" / str(restart)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def arguments(self) -> list[str]:
        """What parse() reads; only what differs from the defaults."""
        words = {
            "--run-dir": str(self.run_dir),
            "--config-dir": str(self.config_dir) if self.config_dir else None,
            "--nodes": str(self.nodes),
            "--ranks-per-node": str(self.ranks_per_node),
            "--gpus-per-node": str(self.gpus_per_node) if self.gpus_per_node else None,
            "--cpus-per-task": str(self.cpus_per_task) if self.cpus_per_task else None,
            "--cpu-bind": self.cpu_bind,
            "--max-restarts": str(self.max_restarts),
            "--no-progress": str(self.no_progress),
            "--container": self.container,
            "--container-runtime": self.container_runtime if self.container else None,
            "--container-python": self.container_python if self.container else None,
        }
        listed = [f"--exclude={node}" for node in self.exclude]
        listed += [f"--container-mount={mount}" for mount in self.container_mounts]
        options = [f"{name}={value}" for name, value in words.items() if value is not None]
        return [*options, *listed, *([] if self.preflight else ["--no-preflight"]), "--", *self.overrides]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "JobSpec":
        """Raises ConfigError for what arguments() does not make.

        Not by argparse, which takes a value of `--` away (seen in 3.11) and completes names.
        """
        if "--" not in arguments:
            raise ConfigError("the overrides are missing, after --.", at="command line", do=USE_SLURM_PY)
        place = list(arguments).index("--")
        given: dict[str, Any] = {}
        for argument in arguments[:place]:
            option, equals, text = argument.partition("=")
            name = option.removeprefix("--").replace("-", "_")
            if argument == "--no-preflight":
                given["preflight"] = False
            elif not equals or name not in READERS:
                raise ConfigError(f"{argument!r} is not understood.", at="command line", do=USE_SLURM_PY)
            elif name in LISTED:
                given[LISTED[name]] = (*given.get(LISTED[name], ()), text)
            else:
                given[name] = _read(argument, READERS[name], text)
        if "run_dir" not in given:
            raise ConfigError("--run-dir is missing.", at="command line", do=USE_SLURM_PY)
        return cls(overrides=list(arguments[place + 1 :]), **given)


def _read(argument: str, reader: Callable[[str], Any], text: str) -> Any:
    try:
        return reader(text)
    except ValueError:
        raise ConfigError(f"{argument!r} is not understood.", at="command line", do=USE_SLURM_PY) from None


USE_SLURM_PY = "submit with launch/slurm.py, which writes the script."
NUMBERS = ("nodes", "ranks_per_node", "gpus_per_node", "cpus_per_task", "max_restarts", "no_progress")
TEXTS = ("cpu_bind", "container", "container_runtime", "container_python", "exclude", "container_mount")
LISTED = {"exclude": "exclude", "container_mount": "container_mounts"}  # options that may come more than once
READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(NUMBERS, int),
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(("run_dir", "config_dir"), Path),
}
