"""How a start of a job ended, from what its ranks, its run and SLURM leave behind."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.launch.cluster import controller
from tunesmith.launch.training_process import TrainingExit
from tunesmith.train.errors import EXIT_MISTAKE
from tunesmith.train.ranks.stop import RUNNING


@dataclass(frozen=True)
class JobEnd:
    """How a start of the job ended. then: finished, failed, stopped, or again, which asks to be requeued."""

    cause: str
    then: str
    code: int


def ends_of(folder: Path) -> dict[int, str]:
    """What each rank has left there (train/ranks/stop.py): rank -> "75 SIGTERM", "1 <cause>", "0", or RUNNING."""
    found = {}
    for path in folder.glob("rank-*"):
        number = path.name.removeprefix("rank-")
        if number.isdecimal():
            found[int(number)] = path.read_text(encoding="utf-8", errors="replace") or RUNNING
    return found


def unhealthy(nodes: Sequence[str]) -> str:
    """Which of the nodes SLURM reports as unhealthy, in words; empty when it reports none."""
    return "; ".join(f"node {node} is {state}" for node, state in controller.unhealthy_nodes(nodes).items())


def mistake_of(ended: TrainingExit) -> str:
    said = [one for _, one in sorted(ended.ranks.items()) if one.split()[:1] == [str(EXIT_MISTAKE)]]
    words = said[0].partition(" ")[2] if said else ""
    return words or "the run cannot be run as given: see the log of rank 0"


def cause_of_failure(run_dir: Path, since: float) -> str:
    """Why the run failed, in its own words; empty where it wrote none since then (unix seconds)."""
    path = run_dir / "failure.json"
    try:
        if path.stat().st_mtime < since:
            return ""  # of an earlier start
        return " ".join(str(json.loads(path.read_text(encoding="utf-8"))["cause"]).split())
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def sick_nodes_of_the_run(sick: Path) -> dict[str, str]:
    """Nodes that the run itself found to be sick (train/watch/node_checks.py)."""
    found = {}
    for line in sick.read_text(encoding="utf-8").splitlines() if sick.exists() else []:
        row = json.loads(line)
        found[str(row["node"])] = str(row["reason"])
    return found
