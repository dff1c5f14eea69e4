"""status, logs and cancel against a real SLURM, with jobs whose run folders are written here by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
COMMAND = "from tunesmith.launch.arguments import main; from tunesmith.launch.cluster.{0} import {0}; main({0})"
# Ranks that print at once, and save when they are told to: a driver that is asked to stop then does not start again.
RANKS = """
mkdir -p $RUN/job/logs/${SLURM_RESTART_COUNT:-0}
srun --output=$RUN/job/logs/${SLURM_RESTART_COUNT:-0}/rank-%5t.log bash -c '
    trap "echo rank $SLURM_PROCID saves; exit 75" TERM
    for i in $(seq 2000); do echo restart ${SLURM_RESTART_COUNT:-0} rank $SLURM_PROCID line $i; sleep 0.05; done'
code=$?
if [[ $code == 75 && ! -e $RUN/job/stop ]]; then scontrol requeue $SLURM_JOB_ID; sleep 60; fi
exit $code
"""


class Submitted:
    """A job with a run folder."""

    def __init__(self, slurm, run: Path, job_id: str) -> None:
        self.slurm, self.run, self.job_id = slurm, run, job_id

    def command(self, name: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        return self.slurm.call(sys.executable, "-c", COMMAND.format(name), *arguments, str(self.run), **options)

    def status(self) -> dict:
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def has_printed(self, restart: int, rank: int, line: int) -> bool:
        path = self.run / f"job/logs/{restart}/rank-{rank:05d}.log"
        return path.exists() and f"line {line}\n" in path.read_text()


@pytest.fixture
def submit(slurm, make_job, tmp_path) -> Callable[..., Submitted]:
    """submit("--nodes=2") is a job of ranks as above; it is taken out of the queue after the test."""
    started = []

    def call(*options: str, text: str = RANKS) -> Submitted:
        run = tmp_path / "run"
        (run / "job").mkdir(parents=True, exist_ok=True)
        before = time.time()
        script = make_job(text, "--requeue", f"--output={run}/job/job-%j.log", *options)
        job_id = slurm.submit(script, env={"RUN": str(run)})
        (run / "job/job.json").write_text(json.dumps({"job_id": job_id, "submitted": before, "max_restarts": 3}))
        started.append(Submitted(slurm, run, job_id))
        return started[-1]

    yield call
    for one in started:
        slurm.call("scancel", one.job_id)


def until(condition: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


def test_status_of_a_job_that_waits_runs_restarts_ends_and_is_forgotten(start_cluster, make_job, tmp_path):
    slurm = start_cluster(nodes=2, conf=("MinJobAge=2",))
    run = tmp_path / "run"
    (run / "job").mkdir(parents=True)
    before = time.time()
    job_id = slurm.submit(make_job("srun sleep 300", "--nodes=2", "--time=60", "--requeue", "--begin=now+3"))
    (run / "job/job.json").write_text(json.dumps({"job_id": job_id, "submitted": before}))
    job = Submitted(slurm, run, job_id)

    queue = job.status()["job"]["queue"]
    assert (queue["state"], queue["reason"], queue["nodes"]) == ("PENDING", "BeginTime", None)
    assert 0 <= queue["start_time"] - before <= 5
    slurm.wait_for(job_id, "RUNNING")
    found = job.status()["job"]
    assert found["queue"]["state"] == "RUNNING"
    assert slurm.run("scontrol", "show", "hostnames", found["queue"]["nodes"]).splitlines() == slurm.nodes
    assert 3500 < found["queue"]["seconds_left"] <= 3600
    assert (found["restart"], found["has_ended"]) == (0, False)
    assert "of the job's" in job.command("status").stdout

    slurm.run("scontrol", "requeue", job_id)
    slurm.wait_for(job_id, "RUNNING", restarts=1)
    assert job.status()["job"]["restart"] == 1
    slurm.run("scancel", job_id)
    slurm.wait_for(job_id, "CANCELLED")
    found = job.status()["job"]
    assert (found["queue"]["state"], found["has_ended"]) == ("CANCELLED", True)
    until(lambda: job.status()["job"]["queue"] is None, timeout=40)
    assert job.status()["job"]["has_ended"]
    assert "no longer in the queue" in job.command("status").stdout


def test_a_controller_that_is_away_is_said_and_not_taken_for_the_end(start_cluster, make_job, tmp_path):
    slurm = start_cluster(nodes=1)
    run = tmp_path / "run"
    (run / "job").mkdir(parents=True)
    job_id = slurm.submit(make_job("sleep 300"))
    (run / "job/job.json").write_text(json.dumps({"job_id": job_id, "submitted": time.time()}))
    job = Submitted(slurm, run, job_id)
    slurm.wait_for(job_id, "RUNNING")
    slurm.run("scontrol", "shutdown", "slurmctld")
    time.sleep(1)

    found = job.status()["job"]
    assert "Unable to contact slurm controller" in found["queue_problem"]
    assert not found["has_ended"]
    done = job.command("cancel")
    assert done.returncode == 2
    assert done.stderr.startswith("TrainingError: SLURM does not answer")
    assert "scontrol ping" in done.stderr
    assert not (run / "job/stop").exists()  # it may restart as before
    slurm.verb("boot", "ctl")
    assert job.status()["job"]["queue"]["state"] == "RUNNING"


def test_logs_follows_ranks_of_two_nodes_over_a_restart_until_the_job_has_ended(slurm, submit, tmp_path):
    job = submit("--nodes=2", "--ntasks-per-node=2")
    output = tmp_path / "followed"
    with output.open("wb") as file:
        command = [sys.executable, "-c", COMMAND.format("logs"), "-f", str(job.run)]
        process = subprocess.Popen(command, env=slurm.env, stdout=file, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: all(job.has_printed(0, rank, 20) for rank in range(4)))
        slurm.run("scontrol", "requeue", job.job_id)
        until(lambda: all(job.has_printed(1, rank, 20) for rank in range(4)))
        slurm.run("scancel", job.job_id)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert said.endswith(f"-- job {job.job_id} has ended\n")
    lines = output.read_text().splitlines()
    for restart in (0, 1):
        for rank in range(4):
            path = job.run / f"job/logs/{restart}/rank-{rank:05d}.log"
            start = f"restart {restart} rank {rank} line "
            expected = [f"[{rank}] {line}" for line in path.read_text().splitlines() if line.startswith(start)]
            found = [line for line in lines if line.startswith(f"[{rank}] {start}")]
            assert found == expected  # each line once, whole, in its order
    assert all(line.startswith(("[0] ", "[1] ", "[2] ", "[3] ", "[job] ")) for line in lines)


def test_logs_that_nobody_reads_any_more_ends_while_the_job_goes_on(slurm, submit):
    job = submit("--nodes=1")
    until(lambda: job.has_printed(0, 0, 3))
    command = [sys.executable, "-c", COMMAND.format("logs"), "-f", "--rank", "0", str(job.run)]
    with subprocess.Popen(command, env=slurm.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"[0] restart 0 rank 0 line ")
        process.stdout.close()
        assert process.wait(timeout=10) == 0
        assert process.stderr is not None
        assert b"rror" not in process.stderr.read()
    assert slurm.facts(job.job_id)["JobState"] == "RUNNING"


def test_cancel_ends_the_job_for_good(slurm, submit):
    job = submit("--nodes=2")
    until(lambda: job.has_printed(0, 1, 1))
    done = job.command("cancel")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"job {job.job_id} (RUNNING on ")
    assert done.stdout.endswith(") is cancelled.\n")
    slurm.wait_for(job.job_id, "CANCELLED")
    again = job.command("cancel")
    assert again.returncode == 2
    assert f"job {job.job_id} has ended (CANCELLED): there is nothing to cancel" in again.stderr
    time.sleep(2)  # a requeue from within would show
    assert slurm.facts(job.job_id)["JobState"] == "CANCELLED"


def test_cancel_save_lets_the_ranks_save_and_the_job_does_not_start_again(slurm, submit):
    job = submit("--nodes=2")
    until(lambda: job.has_printed(0, 0, 1) and job.has_printed(0, 1, 1))
    done = job.command("cancel", "--save")
    assert done.returncode == 0, done.stderr
    assert "its ranks were told to save" in done.stdout
    facts = slurm.wait_for(job.job_id, "FAILED")  # the script ends with its ranks' 75, by itself
    assert facts["ExitCode"] == "75:0"
    assert facts["Restarts"] == "0"
    for rank in range(2):
        assert f"rank {rank} saves\n" in (job.run / f"job/logs/0/rank-{rank:05d}.log").read_text()


def test_without_a_stop_file_the_same_signal_starts_the_job_again(slurm, submit):
    """Or the test above would show nothing."""
    job = submit("--nodes=2")
    until(lambda: job.has_printed(0, 0, 1) and job.has_printed(0, 1, 1))
    slurm.run("scancel", "--signal=TERM", job.job_id)
    slurm.wait_for(job.job_id, "RUNNING", restarts=1)


def test_cancel_of_a_job_that_waits_or_has_no_ranks(slurm, submit):
    for options in (("--hold",), ()):
        job = submit(*options, text="sleep 300")
        slurm.wait_for(job.job_id, "PENDING" if options else "RUNNING")
        done = job.command("cancel", "--save")
        assert done.stdout.endswith("is cancelled; no ranks were running, so there was nothing to save.\n")
        slurm.wait_for(job.job_id, "CANCELLED")
        assert (job.run / "job/stop").exists()


def test_a_users_own_squeue_settings_change_nothing(slurm, submit):
    job = submit("--nodes=1", text="sleep 300")
    slurm.wait_for(job.job_id, "RUNNING")
    own = {"SQUEUE_FORMAT": "%i", "SQUEUE_STATES": "PENDING", "SQUEUE_USERS": "nobody", "SLURM_TIME_FORMAT": "relative"}
    done = job.command("status", "--json", env=own)
    assert json.loads(done.stdout)["job"]["queue"]["state"] == "RUNNING"


def test_the_loss_and_the_steps_of_a_real_run_are_shown(training_env, tmp_path):
    """A short training writes what status reads: the steps in all, above others."""
    command = [
        sys.executable,
        "launch/train.py",
        "+exp=debug",
        f"output_dir={tmp_path / 'run'}",
        "track.wandb=disabled",
    ]
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_"))
    } | training_env
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise
    assert process.returncode == 0, said[-3000:]
    command = [sys.executable, "-c", COMMAND.format("status"), str(tmp_path / "run")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert rows["state"] == "finished"
    step, total = rows["step"].split(" (")[0].split(" of ")
    assert step == total == str(json.loads((tmp_path / "run/summary.json").read_text())["steps"])
    assert float(rows["loss"]) > 0
    assert rows["checkpoint"].startswith(f"step {step}, ")
