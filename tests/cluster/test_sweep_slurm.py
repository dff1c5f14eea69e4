"""Sweeps whose trials are jobs of a real SLURM: Tunesmith's own, and those of Hydra's submitit launcher."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster

SWEEP = str(Path(__file__).parents[2] / "launch/sweep.py")
SHORT = ("+exp=debug", "evaluate.generate=false", "schedule.max_steps=4", "checkpoint.at_end=false")
AS_JOBS = ("cluster=slurm", "cluster.gpus_per_node=null", "cluster.tasks_per_node=1", "cluster.preflight=false")
RATES = "optimizer.learning_rate=1e-4,1e-3,1e-2,3e-2"


def sweep_command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, SWEEP, "-m", *overrides, f"output_dir={folder}", "hydra.sweeper.n_jobs=2"]


def report(folder: Path) -> dict[str, Any]:
    path = folder / "sweep.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"trials": []}


def said(folder: Path) -> str:
    """What the jobs have printed last."""
    files = [*folder.glob("trials/*/job/*.log"), *folder.glob("trials/*/job/logs/*/*.log"), *folder.glob("logs/*")]
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in files)


def test_four_trials_as_jobs_of_which_one_fails_and_a_killed_driver_finds_its_jobs_again(
    slurm: Any, training_env: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    rates = RATES.replace("3e-2", "-1,3e-2")  # the fourth cannot be run
    command = sweep_command(folder, *SHORT, *AS_JOBS, rates)
    first = subprocess.Popen(
        command, env=slurm.env | training_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with first:
        deadline = time.monotonic() + 120
        jobs = []
        while len(jobs) < 2:
            assert time.monotonic() < deadline, said(folder)
            assert first.poll() is None, first.stdout.read() if first.stdout else ""
            jobs = [json.loads(path.read_text())["job_id"] for path in folder.glob("trials/*/job/job.json")]
            time.sleep(0.2)
        first.kill()
    done = slurm.call(*command, env=training_env, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr + said(folder)
    trials = report(folder)["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 3 + ["failed", "finished"], said(folder)
    assert "learning_rate must be above 0" in trials[3]["cause"]
    assert {f"as job {job}" for job in jobs} <= {f"as job {word}" for word in done.stdout.replace(":", " ").split()}
    used = {json.loads(path.read_text())["job_id"] for path in folder.glob("trials/*/job/job.json")}
    assert set(jobs) <= used, "the jobs of the killed driver were gone on with, none was submitted twice"
    assert len(used) == 4


def test_a_stopped_sweep_saves_its_jobs_and_goes_on(slurm: Any, training_env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    slow = {"TUNESMITH_FAULTS": "slow:step=0,last_step=100000,phase=forward,seconds=0.7"}
    command = sweep_command(folder, *SHORT, *AS_JOBS, RATES.removesuffix(",1e-2,3e-2"), "schedule.max_steps=30")
    with subprocess.Popen(
        command, env=slurm.env | training_env | slow, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as first:
        deadline = time.monotonic() + 200
        while len([path for path in folder.glob("trials/*/metrics.jsonl") if path.stat().st_size > 400]) < 2:
            assert time.monotonic() < deadline, said(folder)
            time.sleep(0.2)
        first.terminate()
        assert first.wait(120) == 75, said(folder)
    assert [trial["status"] for trial in report(folder)["trials"]] == ["stopped", "stopped"]
    done = slurm.call(*command, env=training_env, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr + said(folder)
    assert done.stdout.count("starts again, from step") == 2
    assert [trial["status"] for trial in report(folder)["trials"]] == ["finished", "finished"]


def test_trials_by_hydras_submitit_launcher(slurm: Any, training_env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1")
    command = sweep_command(folder, *SHORT, *launcher, RATES.removesuffix(",3e-2").replace("1e-4", "-1"))
    done = slurm.call(*command, env=training_env, cwd=tmp_path, timeout=500)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "learning_rate must be above 0" in done.stderr, "the first combination is looked at before any job"
    command = sweep_command(folder, *SHORT, *launcher, RATES)
    done = slurm.call(*command, env=training_env, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr + said(folder)
    assert [trial["status"] for trial in report(folder)["trials"]] == ["finished"] * 4, said(folder)
    assert done.stdout.count("by SlurmLauncher") == 4
