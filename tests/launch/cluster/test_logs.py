"""What the ranks print, with their names before it; followed while they run: tests/cluster/test_status.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.launch.cluster.logs import LogRequest, logs, read
from tunesmith.train.errors import ConfigError

COMMAND = "from tunesmith.launch.arguments import main; from tunesmith.launch.cluster.logs import logs; main(logs)"


@pytest.fixture
def run(make_run) -> Path:
    """Two restarts of two ranks, and a driver."""
    run = make_run(job={"job_id": "12"}, events=[{"event": "started", "restart": 0}])
    (run / "job/job-12.log").write_text("driver one\ndriver two\n")
    for restart in (0, 1):
        for rank in (0, 1, 10):
            path = run / f"job/logs/{restart}/rank-{rank:05d}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"restart {restart} rank {rank} line {line}\n" for line in range(3)))
    return run


def shown(capfdbinary, *arguments: str) -> list[str]:
    logs([*arguments])
    return capfdbinary.readouterr().out.decode().splitlines()


def test_all_ranks_of_the_newest_restart_and_the_driver(run, capfdbinary):
    lines = shown(capfdbinary, str(run))
    assert lines[:2] == ["[job] driver one", "[job] driver two"]
    assert lines[2:] == [f"[{rank}] restart 1 rank {rank} line {line}" for rank in (0, 1, 10) for line in range(3)]


def test_one_rank_an_earlier_restart_the_last_lines(run, capfdbinary):
    arguments = ("--rank", "10", "--restart=0", "--lines", "2", str(run))
    assert shown(capfdbinary, *arguments) == ["[10] restart 0 rank 10 line 1", "[10] restart 0 rank 10 line 2"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--rank", "2"], "rank 2 has no log; ranks with one: 0 to 10"),
        (["--restart", "2"], "restart 2 has no logs; there are: 0, 1"),
        (["--rank", "-1"], "--rank=-1 is not a whole number"),
        (["--lines", "x"], "--lines=x is not a whole number"),
        (["--lines"], "give one run folder|--lines needs a value"),
        (["-f", "--restart", "0"], "-f follows the newest restart"),
        (["--all"], "give one run folder"),
    ],
)
def test_what_is_not_there_is_named(run, arguments, what):
    with pytest.raises(ConfigError, match=what):
        logs([*arguments[:1], *arguments[1:], str(run)] if arguments != ["--lines"] else [str(run), "--lines"])


def test_a_run_without_a_job_is_refused(make_run):
    with pytest.raises(ConfigError, match="this run has no SLURM job"):
        logs([str(make_run())])


def test_following_shows_ten_lines_if_not_said_otherwise():
    assert read(["-f", "x"]) == (LogRequest(lines=10, follow=True), "x")
    assert read(["--follow", "--lines=3", "x"]) == (LogRequest(lines=3, follow=True), "x")
    assert read(["x"]) == (LogRequest(), "x")


def start(run: Path, *arguments: str, **options) -> subprocess.Popen[bytes]:
    """logs -f, on a machine without SLURM: the job's own events say when it has ended."""
    environment = os.environ | {"PATH": "/nowhere"}
    command = [sys.executable, "-c", COMMAND, *arguments, str(run)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def test_following_takes_up_new_ranks_and_restarts_and_ends_with_the_job(run):
    with start(run, "-f", "--lines", "1") as process:
        assert process.stdout is not None
        assert process.stderr is not None

        def until(line: str) -> list[str]:
            lines = []
            while not lines or lines[-1] != line:
                lines.append(process.stdout.readline().decode().rstrip("\n"))
                assert lines[-1], process.stderr.read().decode()
            return lines

        assert until("[10] restart 1 rank 10 line 2") == [
            "[job] driver two",
            *[f"[{rank}] restart 1 rank {rank} line 2" for rank in (0, 1, 10)],
        ]
        append(run / "job/logs/1/rank-00001.log", "whole\nto")
        assert until("[1] whole") == ["[1] whole"]
        append(run / "job/logs/1/rank-00002.log", "a\nb\nc\n")  # all of what comes later, not the last line of it
        assert until("[2] c") == ["[2] a", "[2] b", "[2] c"]
        append(run / "job/logs/1/rank-00001.log", "rn\nlast words")
        assert until("[1] torn") == ["[1] torn"]
        requeued = {"event": "ended", "then": "requeued", "time": time.time(), "job_id": "12"}
        append(run / "job/events.jsonl", json.dumps(requeued) + "\n")
        append(run / "job/logs/2/rank-00000.log", "again 1\nagain 2\n")
        assert until("[0] again 2") == ["[1] last words", "[0] again 1", "[0] again 2"]
        finished = {"event": "ended", "then": "finished", "time": time.time(), "job_id": "12"}
        append(run / "job/logs/2/rank-00000.log", "end")
        append(run / "job/events.jsonl", json.dumps(finished) + "\n")
        assert process.stdout.read().decode() == "[0] end\n"
        said = process.stderr.read().decode()
        assert process.wait(timeout=10) == 0
    assert "there is no program 'squeue' on this machine" in said
    assert said.count("-- ") == 3  # that, the restart, the end
    assert said.endswith("-- job 12 has ended\n")


@pytest.mark.parametrize("arguments", [(), ("-f",)])
def test_a_reader_that_leaves_ends_it_quietly(run, arguments):
    append(run / "job/logs/1/rank-00000.log", "x" * 200 + "\n" + "y\n" * 200_000)
    with start(run, *arguments, "--lines", "200000") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        assert b"rror" not in process.stderr.read()


def test_ctrl_c_ends_following_quietly(run):
    with start(run, "-f") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert "interrupted" not in said
