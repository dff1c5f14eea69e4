"""Where a run is, from its files, and from what the queue answers; the real queue: tests/cluster/test_status.py."""

import json
import re
import time
from dataclasses import replace

import pytest

from tunesmith.launch.cluster import status as module
from tunesmith.launch.cluster.figures import moment
from tunesmith.launch.cluster.queue import JobFacts
from tunesmith.launch.cluster.status import status, status_of, words
from tunesmith.train.errors import ConfigError, TrainingError

RUNNING = JobFacts("RUNNING", None, 1, "n[1-2]", time.time(), time.time() + 7200)


@pytest.fixture
def queue_says(monkeypatch):
    """queue_says(facts) is what SLURM answers; an error is raised."""

    def say(answer):
        def answer_once(job_id):
            assert job_id == "12"
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(module, "job_facts", answer_once)

    return say


def test_a_running_job(make_run, queue_says, capsys):
    queue_says(RUNNING)
    started = {"restart": 1, "event": "started", "nodes": ["n1", "n2"]}
    lost = {"restart": 0, "event": "ended", "cause": "node n3 was lost", "then": "requeued"}
    sick = {"restart": 1, "event": "sick", "node": "n3", "reason": "no GPU"}
    run = make_run(job={"job_id": "12"}, events=[lost, started, sick], steps=30, total_steps=60, checkpoint=20)
    status([str(run)])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["job"] == "12, restart 1 of at most 100"
    assert shown["state"] == "RUNNING"
    assert shown["nodes"] == "n[1-2]"
    assert re.match(r"(2:00:00|1:[45]\d:\d\d) h left", shown["time"])
    assert shown["step"].startswith("30 of 60 (50%), ")
    assert shown["loss"] == "4.7000"
    assert shown["tokens/s"] == "12,346"
    assert shown["left"] == "15 s of training at 0.5 s a step"
    assert shown["checkpoint"].startswith("step 20, ")
    assert shown["sick"] == "n3: no GPU"
    assert shown["start"].endswith("node n3 was lost: requeued")


def test_json_says_the_same(make_run, queue_says, capsys):
    queue_says(RUNNING)
    run = make_run(job={"job_id": "12"}, steps=30, total_steps=60)
    status(["--json", str(run)])
    found = json.loads(capsys.readouterr().out)
    assert found["job"]["queue"]["state"] == "RUNNING"
    assert found["job"]["restart"] == 1
    assert found["progress"]["seconds_left"] == 15
    assert (found["progress"]["step"], found["progress"]["total_steps"]) == (30, 60)
    assert found["checkpoint"] is None
    assert not found["job"]["has_ended"]


def test_a_job_that_waits_has_a_run_folder_without_a_config(make_run, queue_says, capsys):
    queue_says(JobFacts("PENDING", "Resources", 0, None, time.time() + 60, None))
    run = make_run(job={"job_id": "12", "max_restarts": 7})
    (run / "config.yaml").unlink()
    status([str(run)])
    shown = capsys.readouterr().out
    assert "restart 0 of at most 7\n" in shown
    assert "PENDING (Resources), may start 20" in shown
    assert "none yet" in shown


@pytest.mark.parametrize(
    ("summary", "became"),
    [({"status": "finished"}, "finished"), ({"status": "failed", "error": "x"}, "failed"), (None, "stopped")],
)
def test_a_job_that_has_left_the_queue(make_run, queue_says, summary, became):
    queue_says(None)
    end = {"restart": 2, "event": "ended", "cause": "asked to stop", "then": "stopped"}
    rows = dict(words(status_of(make_run(job={"job_id": "12"}, events=[end], steps=3, total_steps=9, summary=summary))))
    assert rows["state"] == f"no longer in the queue; the run: {became}"
    assert rows["job"] == "12, restart 2 of at most 100"
    assert rows["restart 2"].endswith("asked to stop: stopped")
    assert "left" not in rows  # nobody works on the rest


def test_a_controller_that_does_not_answer_costs_but_its_part(make_run, queue_says):
    queue_says(TrainingError("SLURM does not answer: no answer in 30 s."))
    rows = dict(words(status_of(make_run(job={"job_id": "12"}, steps=3, total_steps=9))))
    assert rows["state"] == "not known: SLURM does not answer: no answer in 30 s."
    assert rows["step"].startswith("3 of 9")
    assert "left" in rows


def test_what_happened_to_an_earlier_job_of_the_run_says_nothing_of_this_one(make_run, queue_says):
    queue_says(RUNNING)
    end = {"restart": 8, "event": "ended", "cause": "it died", "then": "failed", "job_id": "11"}
    found = status_of(make_run(job={"job_id": "12"}, events=[end], steps=3))
    assert not found["job"]["has_ended"]
    assert found["job"]["restart"] == 1
    assert found["job"]["ends"][0]["cause"] == "it died"


def test_a_run_without_a_job(make_run, capsys):
    run = make_run(steps=4, total_steps=8, summary={"status": "failed", "error": "rank 1 was killed"})
    status([str(run)])
    shown = capsys.readouterr().out
    assert "none: it was not submitted by launch/slurm.py" in shown
    assert "state       failed\n" in shown
    assert "cause       rank 1 was killed\n" in shown


def test_torn_and_foreign_lines_are_passed_over(make_run, queue_says):
    queue_says(RUNNING)
    run = make_run(job={"job_id": "12"}, steps=3, total_steps=9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "eval/loss": 2.0}\n["no row"]\n{"train/loss": 1}\n{"step": 4, "train/lo')
    with (run / "job/events.jsonl").open("a") as file:
        file.write('{"event": 7}\n{}\n{"event": "ended", "th')
    found = status_of(run)
    assert found["progress"]["step"] == 3
    assert not found["job"]["has_ended"]


ABSURD = [-1, 0, 0.5, 1e300, -1e300, 2**63, 1e16, True, None, "12", "", [], {}, [[1]], {"a": 1}]


@pytest.mark.parametrize("value", ABSURD, ids=repr)
def test_absurd_figures_are_not_known(make_run, queue_says, capsys, value):
    queue_says(replace(RUNNING, start_time=moment(value), end_time=moment(value)))
    event = {"restart": value, "time": value, "cause": value, "then": value, "node": value, "reason": value}
    events = [{**event, "event": name} for name in ("started", "sick", "ended")]
    run = make_run(job={"job_id": "12", "submitted": value, "max_restarts": value}, events=events, steps=2)
    figures = ("step", "train/loss", "throughput/step_seconds", "throughput/tokens_per_second")
    with (run / "metrics.jsonl").open("a") as file:
        for name in figures:
            file.write(json.dumps({"step": 3, "train/loss": 1.0, name: value}) + "\n")
        file.write(json.dumps(dict.fromkeys(figures, value) | {"step": 4}) + "\n")
    (run / "plan.json").write_text(json.dumps({"total_steps": value}))
    (run / "summary.json").write_text(json.dumps({"status": value, "steps": value, "error": value}))
    (run / "checkpoints" / f"step-{'9' * 30}").mkdir(parents=True)
    (run / "checkpoints" / f"step-{'9' * 30}" / "MANIFEST.json").write_text("{}")
    status([str(run)])
    assert "step        4" in capsys.readouterr().out
    status(["--json", str(run)])
    found = json.loads(capsys.readouterr().out)
    assert found["progress"]["step"] == 4
    assert found["progress"]["loss"] == (value if value in (-1, 0, 0.5) and value is not True else None)
    assert found["job"]["restart"] == 1
    assert found["checkpoint"] is None


def test_of_a_long_run_the_end_is_read(make_run, queue_says):
    queue_says(RUNNING)
    run = make_run(job={"job_id": "12"}, steps=9, total_steps=40)
    rows = (run / "metrics.jsonl").read_bytes()
    with (run / "metrics.jsonl").open("wb") as file:
        file.seek(2**40)  # a terabyte in front that takes no room: to read it would take all day
        file.write(b"\n" + rows)
    assert status_of(run)["progress"]["step"] == 9


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "cannot be read"),
        ("[]", "job_id=None"),
        ('{"job_id": "--help"}', "job_id='--help'"),
        ('{"job_id": 12}', "job_id=12"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(make_run, text, what):
    run = make_run(job={"job_id": "12"})
    (run / "job/job.json").write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        status([str(run)])
    assert "job/job.json" in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--jsn", "a"], ["--json"]])
def test_other_command_lines_are_refused(arguments):
    with pytest.raises(ConfigError, match=r"write: python launch/slurm\.py status"):
        status(arguments)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        status([str(tmp_path)])
