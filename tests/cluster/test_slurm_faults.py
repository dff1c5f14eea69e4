"""Nodes that crash or are cut off while a job trains on them: it goes on elsewhere, and only there."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("cluster_jobs", Path(__file__).with_name("jobs.py"))
jobs = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = jobs
spec.loader.exec_module(jobs)
QUICK, SLOWLY, Job = jobs.QUICK, jobs.SLOWLY, jobs.Job

pytestmark = pytest.mark.cluster
EVERY = 3
LONG = (
    "schedule.max_steps=60",
    f"checkpoint.every_steps={EVERY}",
    "evaluate.every_steps=20",
    "checkpoint.keep_last=100",
)
ONE_NODE = ("cluster.nodes=1", "cluster.tasks_per_node=2")


@pytest.fixture(scope="module")
def own_slurm(start_cluster):
    """A cluster for its crashes alone."""
    cluster = start_cluster(nodes=4)
    if not cluster.has_networks:
        pytest.skip("nodes without networks of their own: no root, or no network namespaces")
    return cluster


@pytest.fixture(scope="module")
def unbroken(own_slurm, training_env, tmp_path_factory):
    """The losses of QUICK and LONG when nothing happens."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    return Job(own_slurm, training_env, run).submit(*QUICK, *LONG).finish().losses()


@pytest.fixture
def job(own_slurm, training_env, tmp_path):
    made = Job(own_slurm, training_env, tmp_path / "run")
    yield made
    own_slurm.call("scancel", made.job_id) if made.job_id else None


def nodes_of(job, restart: int) -> list[str]:
    return next(row["nodes"] for row in job.events("started") if row["restart"] == restart)


def newest_saved(job) -> int:
    return max((int(path.parent.name[5:]) for path in job.run.glob("checkpoints/step-*/MANIFEST.json")), default=0)


def test_a_crashed_node_costs_at_most_one_save_interval(job, own_slurm, unbroken):
    job.submit(*QUICK, *LONG, faults=SLOWLY.format(1))
    job.wait_for_step(8)
    lost = nodes_of(job, 0)[1]
    own_slurm.verb("crash", own_slurm.host(lost))
    done = job.step()
    job.wait_for_step(1, restart=1, timeout=200)
    resumed = next(row["step"] for row in job.events("ended") if row["restart"] == 0)
    job.finish()
    own_slurm.verb("boot", own_slurm.host(lost))
    own_slurm.wait_for_node(lost, "idle")
    ends = [row for row in job.events("ended") if row["restart"] == 0]
    assert len(ends) == 1
    assert lost in ends[0]["cause"]
    assert "\n" not in ends[0]["cause"]
    assert resumed > done - 1 - EVERY
    assert lost not in nodes_of(job, 1)
    assert job.losses() == unbroken


def test_ranks_on_a_node_that_is_cut_off_stop_without_writing(job, own_slurm, unbroken):
    """The whole job is on that node, so that its ranks miss nobody and train on."""
    job.submit(*QUICK, *ONE_NODE, *LONG, faults=SLOWLY.format(1))
    job.wait_for_step(8)
    (cut,) = nodes_of(job, 0)
    own_slurm.verb("link", own_slurm.host(cut), "down")
    done = job.step()
    job.until(lambda: job.started(1), "the second start", 120)
    job.until(lambda: job.step() > done, "training on the node that is cut off, or after it")
    job.wait_for_step(1, restart=1)
    rank_0 = job.run / "job/logs/0/rank-00000.log"
    job.until(lambda: "has taken over this run" in rank_0.read_text(), "the word of the old rank 0")
    own_slurm.verb("link", own_slurm.host(cut), "up")
    job.finish()
    own_slurm.wait_for_node(cut, "idle", timeout=60)
    time.sleep(3)  # for whatever the old start would still do
    assert [(row["restart"], row["then"]) for row in job.events("ended")] == [(0, "requeued"), (1, "finished")]
    assert cut in job.events("ended")[0]["cause"]
    assert job.losses() == unbroken
    assert newest_saved(job) == 60
    assert json.loads((job.run / "summary.json").read_text())["status"] == "finished"
    assert not (job.run / "failure.json").exists()
    assert not list(job.run.glob("checkpoints/*.tmp-*"))
    assert not list(job.run.glob("checkpoints/*.bad-*"))


def test_a_link_that_is_cut_between_two_nodes_is_one_cause_line_and_the_job_goes_on_without_the_node(
    job, own_slurm, unbroken
):
    minutes = ("cluster.timeout_minutes=0.1", "cluster.save_timeout_minutes=0.1")
    job.submit(*QUICK, *LONG, *minutes, faults=SLOWLY.format(1))
    job.wait_for_step(8)
    cut = nodes_of(job, 0)[1]
    own_slurm.verb("link", own_slurm.host(cut), "down")
    job.wait_for_step(1, restart=1, timeout=200)
    own_slurm.verb("link", own_slurm.host(cut), "up")
    job.finish()
    own_slurm.wait_for_node(cut, "idle", timeout=60)
    ends = [row for row in job.events("ended") if row["restart"] == 0]
    assert len(ends) == 1
    assert cut in ends[0]["cause"]
    assert cut not in nodes_of(job, 1)
    assert job.losses() == unbroken


def test_a_node_that_is_not_fit_is_named_and_left_out(job, own_slurm):
    """Its shared memory is full: NCCL and the table of the ranks could not use it."""

    def give_shared_memory(size: str) -> None:
        own_slurm.verb("exec", "n1", "mount", "-o", f"remount,size={size}", "/dev/shm")

    give_shared_memory("4k")
    try:
        job.submit(*QUICK).finish()
    finally:
        give_shared_memory("50%")
    (sick,) = job.events("sick")
    assert sick["node"] == "n1"
    assert "/dev/shm has 0 MiB free" in sick["reason"]
    assert "n1" in nodes_of(job, 0)
    assert "n1" not in nodes_of(job, 1)
    assert "#SBATCH --exclude=n1" in job.call("--dry-run", *QUICK).stdout
