"""Runs submitted to the test cluster by launch/slurm.py, as a person would, and what they leave."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUBMIT = str(ROOT / "launch/slurm.py")
TWO_NODES = ("cluster.nodes=2", "cluster.gpus_per_node=null", "cluster.tasks_per_node=1")
QUICK = ("+exp=debug", "evaluate.generate=false", *TWO_NODES)
SLOWLY = "slow:step={0},last_step=100000,phase=forward,seconds=0.7"  # TUNESMITH_FAULTS: until it is interrupted


class Job:
    """A run in a folder of its own, submitted as a job.

    Args:
        slurm: the cluster (conftest.py).
        env: for trainings (conftest.py).
        run: its folder.
    """

    def __init__(self, slurm: Any, env: dict[str, str], run: Path) -> None:
        self.slurm, self.env, self.run = slurm, env, run
        self.job_id = ""

    def submit(self, *overrides: str, faults: str = "") -> "Job":
        done = self.call(*overrides, faults=faults)
        assert done.returncode == 0, done.stdout + done.stderr
        self.job_id = json.loads((self.run / "job/job.json").read_text())["job_id"]
        return self

    def call(self, *overrides: str, faults: str = "") -> subprocess.CompletedProcess[str]:
        """launch/slurm.py, however it ends."""
        env = self.env | ({"TUNESMITH_FAULTS": faults} if faults else {})
        return self.slurm.call(
            sys.executable, SUBMIT, *overrides, f"output_dir={self.run}", env=env, cwd=self.run.parent
        )

    def verb(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        """launch/slurm.py status|logs|cancel."""
        return self.slurm.call(sys.executable, SUBMIT, name, *options, str(self.run))

    def finish(self, timeout: float = 240) -> "Job":
        """Until the run has finished; fails with what the job says when it ends otherwise."""
        try:
            self.slurm.wait_for(self.job_id, "COMPLETED", timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None
        assert json.loads((self.run / "summary.json").read_text())["status"] == "finished", self.said()
        return self

    def wait_for_step(self, step: int, restart: int = 0, timeout: float = 150) -> None:
        """Until the run has done a step, in that start of the job or a later one."""
        self.until(lambda: self.started(restart) and self.step() >= step, f"step {step}", timeout)

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come in {timeout} s\n{self.said()}"
            time.sleep(0.1)

    def started(self, restart: int) -> bool:
        return any(row["event"] == "started" and row["restart"] >= restart for row in self.events())

    def step(self) -> int:
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        """Step -> training loss, to the last bit. Fails where a step stands twice, or out of order."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        found = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
        assert [step for step, _ in found] == list(range(1, len(found) + 1))
        return dict(found)

    def events(self, *names: str) -> list[dict[str, Any]]:
        path = self.run / "job/events.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if not names or row["event"] in names]

    def said(self) -> str:
        """What the driver and rank 0 have printed last."""
        files = [*sorted(self.run.glob("job/job-*.log")), *sorted(self.run.glob("job/logs/*/rank-*.log"))]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2500:]}" for path in files)
