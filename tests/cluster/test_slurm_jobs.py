"""Trainings as jobs of a real SLURM: the loss curve, time limits, requeues, cancelling, refusals."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from filelock import FileLock

spec = importlib.util.spec_from_file_location("cluster_jobs", Path(__file__).with_name("jobs.py"))
jobs = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = jobs
spec.loader.exec_module(jobs)
QUICK, SLOWLY, TWO_NODES, Job = jobs.QUICK, jobs.SLOWLY, jobs.TWO_NODES, jobs.Job

pytestmark = pytest.mark.cluster
LONGER = ("schedule.max_steps=16", "checkpoint.every_steps=4", "evaluate.every_steps=8")


@pytest.fixture
def job(slurm, training_env, tmp_path):
    """A run that is not submitted yet; taken out of the queue after the test."""
    made = Job(slurm, training_env, tmp_path / "run")
    yield made
    slurm.call("scancel", made.job_id) if made.job_id else None


@pytest.fixture(scope="module")
def unbroken(slurm, training_env, tmp_path_factory):
    """The losses of QUICK and LONGER when nothing happens."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    return Job(slurm, training_env, run).submit(*QUICK, *LONGER).finish().losses()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_nodes_of_two_ranks_have_the_losses_of_one_node_of_four(slurm, training_env, tmp_path, stage):
    losses = {}
    for nodes, tasks in ((2, 2), (1, 4)):
        shape = (f"cluster.nodes={nodes}", "cluster.gpus_per_node=null", f"cluster.tasks_per_node={tasks}")
        one = Job(slurm, training_env, tmp_path / f"{nodes}-nodes")
        one.submit("+exp=debug", "evaluate.generate=false", f"engine=zero{stage}", *shape).finish()
        assert len(one.events("started")[0]["nodes"]) == nodes
        losses[nodes] = one.losses()
    assert sorted(losses[1]) == [1, 2, 3, 4, 5, 6]
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)


def test_a_job_that_meets_its_time_limit_finishes_after_requeues_bitwise_as_one_left_alone(job, unbroken):
    """USR1 comes after a minute: SLURM looks every 30 s, and a minute early."""
    slow = ";".join(f"{SLOWLY.format(1).replace('0.7', '6')},restart={restart}" for restart in (0, 1))
    job.submit(*QUICK, *LONGER, "cluster.time=2", "cluster.signal_seconds=60", faults=slow)
    job.finish(timeout=400)
    ends = job.events("ended")
    assert [end["then"] for end in ends[:-1]] == ["requeued"] * (len(ends) - 1)
    assert len(ends) >= 2
    assert all("SIGUSR1" in end["cause"] for end in ends[:-1])
    assert ends[-1]["then"] == "finished"
    assert ends[0]["step"] > 0
    assert job.losses() == unbroken


def test_a_requeue_in_mid_step_saves_and_goes_on_bitwise(job, slurm, unbroken):
    job.submit(*QUICK, *LONGER, faults=SLOWLY.format(4))
    job.wait_for_step(6)
    slurm.run("scontrol", "requeue", job.job_id)
    job.finish()
    first, last = job.events("ended")[0], job.events("ended")[-1]
    assert (first["restart"], first["then"]) == (0, "requeued")
    assert (last["restart"], last["then"]) == (1, "finished")
    assert job.losses() == unbroken
    saved = (job.run / "job/logs/0/rank-00000.log").read_text()
    assert "SIGTERM: finishing step" in saved


def test_a_killed_rank_is_named_and_the_job_goes_on(job, unbroken):
    job.submit(*QUICK, *LONGER, faults="kill:rank=1,step=6,phase=forward")
    job.finish()
    first = job.events("ended")[0]
    assert first["then"] == "requeued"
    assert re.match(r"rank 1 (of 2|on n2: Killed)", first["cause"])  # by the ranks, or by srun where that is faster
    assert "\n" not in first["cause"]
    assert job.losses() == unbroken


def test_a_run_that_dies_again_and_again_gives_up(job, slurm):
    dies = ";".join(f"kill:rank=0,step=1,phase=forward,restart={restart}" for restart in range(9))
    job.submit(*QUICK, "cluster.no_progress=2", faults=dies)
    slurm.wait_for(job.job_id, "FAILED", timeout=200)
    assert [end["then"] for end in job.events("ended")] == ["requeued", "failed"]
    assert "2 starts in a row made no newer checkpoint" in job.events("ended")[-1]["cause"]


def test_a_cancelled_job_stays_cancelled(job, slurm):
    """Although SLURM says from then on that its time is over."""
    job.submit(*QUICK, *LONGER, "cluster.time=60", faults=SLOWLY.format(1))
    job.wait_for_step(2)
    slurm.run("scancel", job.job_id)
    slurm.wait_for(job.job_id, "CANCELLED", timeout=60)
    assert [end["then"] for end in job.events("ended")] == ["stopped"]


def test_cancel_with_save_leaves_a_checkpoint_of_the_step_and_the_same_command_goes_on(job, slurm, unbroken):
    job.submit(*QUICK, *LONGER, faults=SLOWLY.format(1))
    job.wait_for_step(2)
    assert job.verb("cancel", "--save").returncode == 0
    slurm.wait_for(job.job_id, "FAILED", timeout=60)
    assert job.events("ended")[-1]["then"] == "stopped"
    assert job.events("ended")[-1]["step"] >= 2
    before = job.job_id
    job.submit(*QUICK, *LONGER).finish()
    assert job.job_id != before
    assert job.losses() == unbroken


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.partition=nope"], ["invalid partition", "cluster.partition"]),
        (["cluster.nodes=99", "batch.global_batch_size=99"], ["cluster.nodes"]),
        (["cluster.memory=9999G"], ["node configuration", "cluster.nodes"]),
        (["batch.global_batch_size=3"], ["global_batch_size=3"]),
        (["cluster.sbatch=['--nonsense=1']"], ["unrecognized option", "nonsense"]),
    ],
)
def test_a_refused_submission_is_one_clear_message_and_leaves_nothing(job, overrides, words):
    done = job.call(*QUICK, *overrides)
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: ")
    assert len(done.stderr.splitlines()) == 3
    assert all(word in done.stderr for word in words)
    assert list(job.run.parent.iterdir()) == []


def test_a_second_job_for_the_same_run_is_refused(job, slurm):
    job.submit(*QUICK, "cluster.sbatch=[--hold]")
    done = job.call(*QUICK)
    assert done.returncode == 2
    assert f"job {job.job_id} of this run is PENDING already" in done.stderr
    assert json.loads((job.run / "job/job.json").read_text())["job_id"] == job.job_id
    (job.run / "job/job.json").unlink()  # as if its submission had been killed before it wrote that down
    assert f"job {job.job_id} of this run is PENDING already" in job.call(*QUICK).stderr


def test_two_submissions_of_a_run_at_once_are_one_job(job, slurm):
    job.run.mkdir()
    with FileLock(job.run / ".tunesmith-submit"):
        done = job.call(*QUICK)
    assert done.returncode == 2
    assert "another submission of this run is under way" in done.stderr
    assert not slurm.run("squeue", "--noheader", "--me", "--states=PENDING,RUNNING")


def test_a_controller_that_is_away_when_a_rank_dies_is_waited_for(start_cluster, training_env, tmp_path, unbroken):
    slurm = start_cluster(nodes=2)
    job = Job(slurm, training_env, tmp_path / "run")
    job.submit(*QUICK, *LONGER, faults=f"{SLOWLY.format(1)};kill:rank=1,step=12,phase=forward")
    job.wait_for_step(2)
    slurm.run("scontrol", "shutdown", "slurmctld")
    log = job.run / f"job/job-{job.job_id}.log"
    job.until(lambda: "SLURM's controller does not answer" in log.read_text(), "the word of the driver", 120)
    slurm.verb("boot", "ctl")
    job.finish()
    first = job.events("ended")[0]
    assert first["then"] == "requeued"
    assert re.match(r"rank 1 (of 2|on n2: Killed)", first["cause"])
    assert job.events("sick") == []
    assert job.losses() == unbroken


def test_a_preempted_job_saves_within_the_grace_time_and_goes_on_bitwise(
    start_cluster, training_env, make_job, tmp_path, unbroken
):
    slurm = start_cluster(
        nodes=2,
        conf=(
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP",
        ),
    )
    job = Job(slurm, training_env, tmp_path / "run")
    job.submit(*QUICK, *LONGER, "cluster.partition=low", faults=SLOWLY.format(1))
    job.wait_for_step(2)
    other = slurm.submit(make_job("sleep 3", "--nodes=2", "--exclusive", "--partition=high"))
    slurm.wait_for(other, "COMPLETED", timeout=90)
    job.finish()
    first = job.events("ended")[0]
    assert first["then"] == "requeued"
    assert "SIGTERM" in first["cause"]
    assert first["step"] >= 2
    assert job.losses() == unbroken
