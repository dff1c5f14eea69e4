"""What the cause line says of a death and of a hang, from real processes and from boards in every state."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tunesmith.train.errors import ConfigError
from tunesmith.train.ranks.phases import Phase, TimeoutKind
from tunesmith.train.watch import cause
from tunesmith.train.watch.rank_status import RankStatus, State
from tunesmith.train.watch.timeouts import Timeouts

NOW = 1000.0
STATUS = RankStatus(
    rank=0,
    pid=100,
    state=State.running,
    stacks_fd=3,
    step=7,
    num_changes=50,
    timeout_kind=TimeoutKind.step,
    changed=NOW - 21,
    allowed=20,
    phase="forward",
    beat=NOW - 0.1,
    collective=90,
)
RUNNING = {0: "S", 1: "S", 2: "R"}


def ranks(**of_rank_1: object) -> list[RankStatus]:
    return [STATUS, replace(STATUS, rank=1, pid=101, **of_rank_1), replace(STATUS, rank=2, pid=102)]


def said_of_hang(statuses: list[RankStatus], states: dict[int, str] = RUNNING) -> cause.Cause:
    found = cause.hang(statuses[0], statuses, 3, NOW, states)
    assert found is not None
    return found


@pytest.mark.parametrize("still", [0.0, 19.9])
def test_a_rank_that_others_wait_for_but_that_moves_on_is_slow_and_not_hanging(still: float) -> None:
    statuses = ranks(collective=89, changed=NOW - still)
    assert cause.hang(statuses[0], statuses, 3, NOW, RUNNING) is None
    assert cause.hang(statuses[0], ranks(collective=89, changed=NOW - 20.1), 3, NOW, RUNNING) is not None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(0)", "exited with code 0, before the run was over,"),
        ("import os; os._exit(3)", "exited with code 3, before the run was over,"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
    ],
)
def test_the_end_of_a_process_is_told_from_its_zombie(code: str, words: str) -> None:
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        deadline = time.monotonic() + 20
        while cause.process_state(process.pid) != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        status = cause.wait_status(process.pid)
    assert status is not None
    found = cause.death(replace(STATUS, pid=process.pid), 3, status, 0)
    assert found.line.startswith(f"rank 0 of 3 (pid {process.pid}) {words} at step 7, in forward")
    assert ("dmesg" in found.line) is ("SIGKILL" in words)


def test_a_process_that_was_waited_for_has_no_status() -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert cause.wait_status(int(process.stdout)) is None
    assert cause.process_state(int(process.stdout)) == ""
    assert "ended, before the run was over, at step 7" in cause.death(STATUS, 3, None, 0).line


def test_a_running_process_has_no_status_and_a_stopped_one_says_so() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert cause.wait_status(process.pid) is None
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while cause.process_state(process.pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cause.process_state(process.pid) == "T"
        process.kill()


def test_the_kernel_is_named_when_it_killed_for_memory() -> None:
    assert "the kernel did it for lack of memory" in cause.death(STATUS, 3, signal.SIGKILL, 1).line
    assert cause.num_oom_kills() >= 0


@pytest.mark.parametrize(
    ("of_rank_1", "states", "words"),
    [
        ({}, RUNNING | {1: "T"}, "rank 1 of 3 (pid 101) is stopped"),
        ({"beat": NOW - 9}, RUNNING, "rank 1 of 3 (pid 101) hangs at step 7, in forward, inside C code"),
        ({"collective": 89}, RUNNING, "rank 1 of 3 (pid 101) hangs at step 7, in forward: nothing moved for 21 s"),
        ({"num_changes": 49}, RUNNING, "rank 1 of 3 (pid 101) hangs"),
        ({"collective": 89, "num_changes": 60}, RUNNING, "rank 1 of 3 (pid 101) hangs"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(
    of_rank_1: dict[str, object], states: dict[int, str], words: str
) -> None:
    found = said_of_hang(ranks(**of_rank_1), states)
    assert found.rank == 1
    assert found.line.startswith(words)
    assert found.line.endswith("rank 0, 2 wait for it")
    assert "(cluster.timeout_minutes=0.333333)" in found.line


def test_a_stopped_rank_comes_before_one_that_holds_the_lock_and_that_before_one_that_is_behind() -> None:
    stopped, holding, behind = ranks()
    statuses = [stopped, replace(holding, beat=NOW - 9), replace(behind, collective=1)]
    assert said_of_hang(statuses, RUNNING | {0: "T"}).rank == 0
    assert said_of_hang(statuses).rank == 1
    assert said_of_hang([statuses[0], statuses[2]]).rank == 2


def test_ranks_that_all_wait_in_the_same_collective_blame_the_network() -> None:
    found = said_of_hang(ranks())
    assert found.line.startswith("all ranks hang at step 7, in forward, in the same collective (number 90)")
    assert "network" in found.line


def test_one_rank_alone_waits_for_nobody() -> None:
    found = cause.hang(STATUS, [STATUS], 1, NOW, {0: "S"})
    assert found is not None
    assert found.line.startswith("rank 0 of 1 (pid 100) hangs at step 7, in forward: nothing moved for 21 s")
    assert "wait" not in found.line


def test_a_rank_of_a_silent_node_is_lost() -> None:
    found = said_of_hang(ranks(beat=NOW - 40), {0: "S", 2: "S"})
    assert found.line.startswith("rank 1 of 3 was last heard of 40 s ago, at step 7, in forward")


def test_an_error_is_one_line() -> None:
    found = cause.error(1, 2, 3, "backward", ValueError("two\nlines"))
    assert found.line == "rank 1 of 2 failed at step 3, in backward: ValueError: two lines"
    known = cause.error(1, 2, 3, "backward", ConfigError("wrong.", at="seed", do="mend it."))
    assert known.line == "rank 1 of 2 failed at step 3, in backward: ConfigError: wrong."
    assert cause.error(0, 1, 0, "starting", AssertionError()).line.endswith("in starting: AssertionError")


@pytest.mark.parametrize(
    ("phase", "started", "kind"),
    [
        (Phase.forward, False, "start"),
        (Phase.forward, True, "step"),
        (Phase.evaluating, True, "step"),
        (Phase.generating, True, "step"),
        (Phase.saving, True, "save"),
        (Phase.saving, False, "save"),
        (Phase.writing_model, True, "save"),
        (Phase.opening_model, True, "save"),
        (Phase.loading_model, True, "start"),  # after going back to a checkpoint
        (Phase.making_engine, True, "start"),
    ],
)
def test_each_phase_has_its_timeout(phase: Phase, started: bool, kind: str) -> None:
    timeouts = Timeouts(start=1.0, step=2.0, save=3.0)
    found = timeouts.kind(phase, started=started)
    assert found is TimeoutKind[kind]
    assert timeouts.seconds(found) == {"start": 1.0, "step": 2.0, "save": 3.0}[kind]
    assert timeouts.of_process_group > 3.0
