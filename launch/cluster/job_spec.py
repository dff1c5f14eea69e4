"""What a job is told of its run, as arguments: the script that is submitted says all of it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tunesmith.train.errors import ConfigError


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
        """Raises ConfigError for what arguments() does not make."""
        if "--" not in arguments:
            raise ConfigError("the overrides are missing, after --.", at="command line")
        place = list(arguments).index("--")
        given = vars(_parser().parse_args(list(arguments[:place])))
        for name in ("exclude", "container_mounts"):
            given[name] = tuple(given[name])
        return cls(overrides=list(arguments[place + 1 :]), **given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.", at="command line", do="submit with launch/slurm.py, which writes the script.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description="The driver of a job: started by the script that launch/slurm.py submits.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--config-dir", type=Path)
    for name, default in (("nodes", 1), ("ranks-per-node", 1), ("max-restarts", 100), ("no-progress", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--cpu-bind", default="cores")
    parser.add_argument("--exclude", action="append", default=[])
    parser.add_argument("--no-preflight", dest="preflight", action="store_false")
    parser.add_argument("--container")
    parser.add_argument("--container-runtime", default="apptainer")
    parser.add_argument("--container-python", default="python3")
    parser.add_argument("--container-mount", dest="container_mounts", action="append", default=[])
    return parser
