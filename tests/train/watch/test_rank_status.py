"""The board: readable after a SIGKILL, one claim for all, nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.train.ranks.phases import TimeoutKind
from tunesmith.train.watch.rank_status import Board, Claim, State, make_board_file


@pytest.fixture
def path() -> Iterator[Path]:
    made = make_board_file(8)
    yield made
    made.unlink()


def other_process(path: Path, local_rank: int, body: str) -> subprocess.Popen[str]:
    code = f"""
        import os, sys, time
        from pathlib import Path
        from tunesmith.train.watch.rank_status import Board
        board = Board(Path({str(path)!r}), 8, {local_rank})
    """
    program = textwrap.dedent(code) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_wrote_is_still_there(path: Path) -> None:
    board = Board(path, 8, 0)
    body = """
        board.reached(12, "über die Länge von 64 Bytes hinaus " * 3, 77, 1, 20.0)
        board.beat(34)
        board.enter(5, 9)
        print(time.monotonic(), flush=True)
        time.sleep(60)
    """
    with other_process(path, 3, body) as process:
        assert process.stdout is not None
        wrote = float(process.stdout.readline())
        process.kill()
        process.wait()
        (slot,) = board.slots()
    assert (slot.rank, slot.pid, slot.state, slot.stacks_fd) == (5, process.pid, State.running, 9)
    assert (slot.step, slot.num_changes, slot.timeout_kind, slot.allowed) == (12, 77, TimeoutKind.step, 20.0)
    assert slot.phase.startswith("über die Länge von")
    assert slot.collective == 34
    assert wrote - 5 < slot.beat <= wrote <= time.monotonic()  # one clock for all processes of a host
    assert wrote - 5 < slot.changed <= wrote
    assert process.returncode == -signal.SIGKILL


def test_only_this_user_can_open_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_of_many_that_claim_at_once_one_does(path: Path) -> None:
    start = time.time() + 3
    body = f"""
        time.sleep(max(0, {start} - time.time()))
        print(int(board.claim(7)))
    """
    processes = [other_process(path, number, body) for number in range(4)]
    claims = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(claims) == ["0", "0", "0", "1"]
    board = Board(path, 8, 0)
    assert (board.claimed, board.exit_code) == (Claim.claimed, 7)
    assert not board.claim(1)
    board.told("why, ü")
    assert (board.claimed, board.exit_code, board.cause) == (Claim.told, 7, "why, ü")


def test_a_rank_that_is_done_says_so(path: Path) -> None:
    board = Board(path, 8, 2)
    assert board.slots() == []
    board.enter(2, 1)
    assert [(slot.rank, slot.pid, slot.state) for slot in board.slots()] == [(2, os.getpid(), State.running)]
    board.leave()
    assert [slot.state for slot in board.slots()] == [State.done]


def test_a_slot_is_never_read_empty_while_another_process_writes_it() -> None:
    path = make_board_file(2)
    writer, reader = Board(path, 2, 0), Board(path, 2, 1)
    writer.enter(0, 0)
    writer.reached(5, "forward", 0, 1, 600.0)
    child = os.fork()
    if child == 0:
        for number in range(300_000):
            writer.reached(5, "forward", number, 1, 600.0)
        os._exit(0)
    found = set()
    while not os.waitpid(child, os.WNOHANG)[0]:
        found |= {(slot.step, slot.phase, slot.allowed) for slot in reader.slots()}
    path.unlink()
    assert found == {(5, "forward", 600.0)}
