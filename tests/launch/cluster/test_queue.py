"""What squeue's line says; tests/cluster/test_status.py asks a real one."""

import pytest

from tunesmith.launch.cluster import queue
from tunesmith.launch.cluster.queue import COLUMNS, job_facts, job_state, parse
from tunesmith.train.errors import ConfigError


def line(**values: str) -> str:
    usual = {"State": "RUNNING", "Reason": "None", "RestartCnt": "0", "TimeLimit": "1:00:00", "NodeList": "n[1-2]"}
    usual |= {"StartTime": "1795817704", "EndTime": "1795821304"}
    return "".join(f"{(usual | values)[name]:{width}}" for name, width in COLUMNS.items()).rstrip()


def test_a_running_job(monkeypatch):
    facts = parse(line())
    assert (facts.state, facts.reason, facts.restarts, facts.nodes) == ("RUNNING", None, 0, "n[1-2]")
    monkeypatch.setattr(queue.time, "time", lambda: 1795821204.0)
    assert facts.seconds_left == 100
    assert not facts.is_over


def test_a_job_that_waits_has_no_nodes_and_its_planned_end_is_no_time_left():
    facts = parse(line(State="PENDING", Reason="Resources", NodeList="", RestartCnt="3"))
    assert (facts.reason, facts.restarts, facts.nodes, facts.seconds_left) == ("Resources", 3, None, None)


def test_a_reason_of_several_words_and_a_time_that_is_not_known():
    facts = parse(line(State="PENDING", Reason="(Nodes required for job are DOWN, DRAINED)", StartTime="N/A"))
    assert facts.reason == "(Nodes required for job are DOWN, DRAINED)"
    assert facts.start_time is None


def test_a_job_without_a_limit_has_no_end():
    facts = parse(line(TimeLimit="UNLIMITED", EndTime="1827353704"))  # squeue gives a year
    assert facts.end_time is None
    assert facts.seconds_left is None


@pytest.mark.parametrize("state", ["COMPLETED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "OUT_OF_MEMORY"])
def test_a_job_that_is_over(state):
    assert parse(line(State=state)).is_over


@pytest.mark.parametrize("job_id", ["--help", "1 2", "", "12;13", "1,2", "\u0661"])
def test_an_id_that_is_none_reaches_no_command(job_id, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="is not the id of a SLURM job"):
        job_state(job_id)


def test_a_machine_without_slurm_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no program 'squeue' on this machine") as caught:
        job_facts("12")
    assert "login node" in str(caught.value)
