"""From a command line to a job's submission, and SLURM's refusals in our words. Nothing here needs SLURM."""

import time
from pathlib import Path

import pytest

from tunesmith.launch.cluster import events
from tunesmith.launch.cluster.events import append, events_of, restarts_without_progress, sick_nodes
from tunesmith.launch.cluster.job_folder import JobFolder
from tunesmith.launch.cluster.submit import _refused, prepare, submit
from tunesmith.train.errors import ConfigError

ENV = {
    "PATH": "/bin",
    "WANDB_API_KEY": "secret",
    "SBATCH_ACCOUNT": "mine",
    "SLURM_CONF": "/c",
    "SLURM_JOB_ID": "7",
    "X": "1",
}
QUICK = ["+exp=debug", "cluster.gpus_per_node=null"]


def test_cluster_slurm_is_implied_and_the_ranks_get_the_listed_variables_alone(tmp_path):
    submission = prepare([*QUICK, f"output_dir={tmp_path}/run"], None, ENV)
    assert submission.spec.overrides == ["cluster=slurm", *QUICK]
    assert submission.spec.run_dir == tmp_path / "run"
    assert submission.env == {"PATH": "/bin", "WANDB_API_KEY": "secret", "SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/c"}
    assert "secret" not in submission.script
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster=local"], "launch/slurm.py submits runs with cluster=slurm, not local."),
        (["cluster.nodes=3"], "global_batch_size=4 does not divide"),
        (["cluster.nodez=3"], "there is no setting 'cluster.nodez'. Did you mean cluster.nodes?"),
        ([f"output_dir={Path.cwd()}/a\\b"], "cannot be written in a script of sbatch"),
        (["data.train='https://u:hunter22@h/x.jsonl'"], "data.train holds a secret, and a job's script writes down"),
        (["track.group='password=hunter22'"], "track.group holds a secret"),
        (["cluster.env=['DB_URL=postgres://u:hunter22@h/db']"], "holds a secret"),
        (["cluster.env=['AWS_SECRET_ACCESS_KEY=hunter22']"], "AWS_SECRET_ACCESS_KEY holds a secret"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, monkeypatch, overrides, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        prepare([*QUICK, *overrides], None, ENV)
    assert words in str(caught.value)
    assert "hunter22" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no program 'sbatch'"):
        submit(QUICK, tmp_path / "runs/one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "key"),
    [
        (
            "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: x",
            "partition",
        ),
        ("allocation failure: Requested node configuration is not available", "nodes"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", "account"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid", "time"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "qos"),
    ],
)
def test_a_refusal_names_the_setting(said, key):
    error = _refused(said)
    assert error.at == f"cluster.{key}"
    assert "\n" not in error.what
    assert "sbatch: error" not in error.what


def ended(step: int) -> dict:
    return {"event": "ended", "step": step}


@pytest.mark.parametrize(
    ("steps", "count"), [([], 0), ([0], 1), ([0, 0], 2), ([5], 0), ([5, 5], 1), ([0, 5, 5, 5], 2), ([5, 5, 9], 0)]
)
def test_restarts_in_vain_are_those_since_the_last_newer_checkpoint(steps, count):
    assert restarts_without_progress([ended(step) for step in steps]) == count


def test_an_earlier_job_of_the_same_run_does_not_count(tmp_path):
    (tmp_path / "job").mkdir()
    for job_id, step in (("7", 0), ("7", 0), ("8", 0)):
        append(tmp_path / "job", 0, "ended", job_id=job_id, step=step)
    assert restarts_without_progress(JobFolder(tmp_path, "8").own_events()) == 1


def test_a_sick_node_is_left_out_for_a_day(tmp_path, monkeypatch):
    append(tmp_path, 0, "sick", node="n2", reason="no GPU")
    append(tmp_path, 0, "sick", node="", reason="the folder is not shared")
    append(tmp_path, 0, "started", nodes=["n1"])
    assert sick_nodes(tmp_path) == {"n2": "no GPU"}
    assert [row["event"] for row in events_of(tmp_path)] == ["sick", "sick", "started"]
    day = time.time() + 25 * 3600
    monkeypatch.setattr(events.time, "time", lambda: day)
    assert sick_nodes(tmp_path) == {}


def test_a_disk_that_is_full_costs_a_line_and_not_the_job(tmp_path):
    append(tmp_path / "gone", 0, "started", nodes=[])
    assert not Path(tmp_path / "gone").exists()
