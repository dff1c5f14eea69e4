"""A process that is asked to end does so, whatever it is busy with; a time limit leaves time to save."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunesmith.train.errors import EXIT_STOPPED, ConfigError
from tunesmith.train.ranks import time_limit
from tunesmith.train.ranks.launchers import launcher_of
from tunesmith.train.ranks.stop import ENDS, SIGNALS
from tunesmith.train.ranks.time_limit import TimeLimit, assumed_save_seconds

LAUNCHED = [
    (["/v/bin/python3", "/v/bin/deepspeed", "--num_gpus", "2", "launch/train.py"], "deepspeed"),
    (
        ["/v/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "launch/train.py"],
        "deepspeed.launcher.launch",
    ),
    (["/v/bin/torchrun", "--nproc_per_node", "2", "launch/train.py"], "torchrun"),
    (["python", "-m", "torch.distributed.run", "launch/train.py"], "torch.distributed.run"),
    (["python", "launch/supervise.py", "--", "torchrun", "launch/train.py"], "supervise.py"),
    (["bash", "-c", "deepspeed launch/train.py"], None),
    (["-bash"], None),
    (["python", "launch/train.py", "name=torchrun"], None),
    (["python", "-m", "pytest", "torchrun"], None),
    (["python", "-u", "launch/train.py", "--local_rank=0"], None),
    ([], None),
]


@pytest.mark.parametrize(("command", "launcher"), LAUNCHED)
def test_a_launcher_is_known_by_the_program_it_runs(command: list[str], launcher: str | None) -> None:
    assert launcher_of(command) == launcher


# What a process does while it is asked: in Python, in a system call, in C code that looks at no signal for 20 s.
BUSY = {
    "in Python": "while True: sum(range(1000))",
    "asleep": "time.sleep(60)",
    "in C": "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 60_000_000)",
    "swallowing everything": """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
""",
}
PROCESS = """
import hashlib, sys, time
from tunesmith.launch.arguments import main
from tunesmith.train.ranks.stop import stop_request
def body(arguments):
    with stop_request.listening():
        PREPARE
        try:
            print("ready", flush=True)
            BUSY
        finally:
            print("tidied", flush=True)
main(body)
"""


def process(busy: str, *, prepare: str = "pass") -> list[str]:
    indented = busy.strip().replace("\n", "\n            ")
    return [sys.executable, "-c", PROCESS.replace("PREPARE", prepare).replace("BUSY", indented)]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    return subprocess.Popen(
        command, env=kept | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def ready(child: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.2)  # it is busy, and its thread has looked at its launchers
    return child


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_loop_a_signal_ends_the_process_with_one_line(number: signal.Signals, tmp_path: Path) -> None:
    child = ready(start(process(BUSY["asleep"]), **{ENDS: str(tmp_path)}))
    assert (tmp_path / "rank-0").read_text() == "running"
    child.send_signal(number)
    out, err = child.communicate(timeout=10)
    assert child.returncode == EXIT_STOPPED
    assert err == f"{number.name}: ending before the first step; there is nothing to save\n"
    assert out == "tidied\n"
    assert (tmp_path / "rank-0").read_text() == f"75 {number.name}"


@pytest.mark.parametrize("doing", BUSY)
def test_it_ends_at_once_whatever_it_is_doing(doing: str) -> None:
    child = ready(start(process(BUSY[doing])))
    child.terminate()
    _, err = child.communicate(timeout=30)  # what it does would take minutes
    assert child.returncode == EXIT_STOPPED
    assert err == "SIGTERM: ending before the first step; there is nothing to save\n"


def test_more_signals_change_nothing() -> None:
    child = ready(start(process(BUSY["swallowing everything"])))
    for number in (*SIGNALS, *SIGNALS):
        child.send_signal(number)
        time.sleep(0.05)
    _, err = child.communicate(timeout=10)
    assert child.returncode == EXIT_STOPPED
    assert err.count("\n") == 1


DEFERRED = """
        stop_request.defer(lambda: "finishing step 12, then saving")
"""
UNTIL_ASKED = "while stop_request.reason is None: time.sleep(0.01)"


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_a_signal_is_noted_and_answered_with_one_line(number: signal.Signals) -> None:
    child = ready(start(process(f"{UNTIL_ASKED}\nprint(stop_request.reason)\ntime.sleep(1)", prepare=DEFERRED.strip())))
    child.send_signal(number)
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=10)
    assert child.returncode == 0
    assert out == f"{number.name}\ntidied\n"
    assert err == f"{number.name}: finishing step 12, then saving\n"


def test_other_ranks_are_asked_in_silence() -> None:
    child = ready(start(process(UNTIL_ASKED, prepare=DEFERRED.strip()), RANK="1"))
    child.terminate()
    assert child.communicate(timeout=10) == ("tidied\n", "")


def test_the_handlers_of_before_are_back_afterwards() -> None:
    from tunesmith.train.ranks.stop import stop_request

    def mine(*_: object) -> None:
        raise AssertionError("not called")

    before = {number: signal.signal(number, mine) for number in SIGNALS}
    try:
        with stop_request.listening():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert [signal.getsignal(number) for number in SIGNALS] == [mine] * len(SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_forked_child_dies_of_a_signal_and_does_not_ask_its_parent_to_stop() -> None:
    fork = """
import os, signal
child = os.fork()
if child == 0: time.sleep(30)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop_request.reason)
"""
    child = ready(start(process(fork)))
    assert child.communicate(timeout=20)[0] == "-15 None\ntidied\n"


@pytest.fixture
def started_by(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """started_by("torchrun", command) is a program of that name, and the process id of the command that it started."""
    pids: list[int] = []
    parents: list[subprocess.Popen[str]] = []

    def begin(name: str, command: list[str]) -> tuple[subprocess.Popen[str], int]:
        program = tmp_path / name
        program.write_text(
            "import subprocess, sys\n"
            "child = subprocess.Popen(sys.argv[1:])\n"
            "print(child.pid, flush=True)\n"
            "child.wait()\n"
        )
        parent = start([sys.executable, str(program), *command])
        parents.append(parent)
        assert parent.stdout is not None
        lines = [parent.stdout.readline() for _ in range(2)]  # its own and that of the command, in either order
        pid = next(int(line) for line in lines if line.strip().isdecimal())
        pids.append(pid)
        time.sleep(0.5)
        return parent, pid

    yield begin
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    for parent in parents:
        parent.kill()
        parent.communicate()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_rank_whose_launcher_was_killed_ends(number: signal.Signals, started_by: Callable[..., tuple]) -> None:
    parent, pid = started_by("torchrun", process(BUSY["swallowing everything"]))
    parent.send_signal(number)
    _, err = parent.communicate(timeout=20)  # its stderr is open for as long as the rank lives
    assert err == "the launcher has gone: ending before the first step; there is nothing to save\n"
    deadline = time.monotonic() + 2  # it has closed its stderr, and is being taken down
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_run_goes_on_when_the_shell_that_started_it_has_gone(started_by: Callable[..., tuple]) -> None:
    parent, pid = started_by("shell.py", process(BUSY["asleep"]))
    parent.kill()
    parent.wait()
    time.sleep(2)
    assert alive(pid)


def limit(monkeypatch: pytest.MonkeyPatch, *, minutes: float | None, elapsed: float) -> TimeLimit:
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: 1000.0 + elapsed)
    return TimeLimit(minutes, started=1000.0, save_seconds=12.0)


def test_the_margin_holds_a_save_two_steps_and_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = limit(monkeypatch, minutes=10, elapsed=500)
    assert watched.margin() == 1.5 * 12
    for seconds in (9.0, *[2.0] * 19, 3.0):  # the first has left the recent ones
        watched.count_step(seconds)
    for seconds in (20.0, 8.0):
        watched.count_save(seconds)
    watched.count_evaluation(7.0)
    assert watched.margin() == 30
    assert watched.margin(another_step=True) == 30 + 2 * 3
    assert watched.margin(another_step=True, evaluation_due=True) == 30 + 6 + 7


@pytest.mark.parametrize(("elapsed", "near"), [(0, False), (569.9, False), (570.0, True), (700, True)])
def test_it_is_near_when_the_margin_is_all_that_is_left(
    monkeypatch: pytest.MonkeyPatch, elapsed: float, near: bool
) -> None:
    watched = limit(monkeypatch, minutes=10, elapsed=elapsed)
    watched.count_save(20.0)
    assert watched.is_near() is near
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a wall clock that is set
    assert watched.is_near() is near


def test_without_a_limit_it_is_never_near(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not limit(monkeypatch, minutes=None, elapsed=1e9).is_near()


def test_a_limit_below_the_start_up_is_a_mistake_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = limit(monkeypatch, minutes=0.5, elapsed=20).too_short()
    assert isinstance(problem, ConfigError)
    assert "time_limit_minutes=0.5 is over before the first step: the start took 20 s, and 18 s are kept" in str(
        problem
    )
    assert "give more than 0.6 minutes" in str(problem)
    assert assumed_save_seconds(2_000_000_000) == 20.0
