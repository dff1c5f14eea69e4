"""The table of the ranks: readable after a SIGKILL, one claim for all, nothing left behind."""

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
from tunesmith.train.watch.rank_status import Claim, RankStatusTable, State, make_table_file


@pytest.fixture
def path() -> Iterator[Path]:
    made = make_table_file(8)
    yield made
    made.unlink()


def other_process(path: Path, local_rank: int, body: str) -> subprocess.Popen[str]:
    code = f"""
        import os, sys, time
        from pathlib import Path
        from tunesmith.train.watch.rank_status import RankStatusTable
        table = RankStatusTable(Path({str(path)!r}), 8, {local_rank})
    """
    program = textwrap.dedent(code) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_wrote_is_still_there(path: Path) -> None:
    table = RankStatusTable(path, 8, 0)
    body = """
        table.reached(12, "über die Länge von 64 Bytes hinaus " * 3, 77, 1, 20.0)
        table.beat(34)
        table.enter(5, 9)
        print(time.monotonic(), flush=True)
        time.sleep(60)
    """
    with other_process(path, 3, body) as process:
        assert process.stdout is not None
        wrote = float(process.stdout.readline())
        process.kill()
        process.wait()
        (status,) = table.statuses()
    assert (status.rank, status.pid, status.state, status.stacks_fd) == (5, process.pid, State.running, 9)
    assert (status.step, status.num_changes, status.timeout_kind, status.allowed) == (12, 77, TimeoutKind.step, 20.0)
    assert status.phase.startswith("über die Länge von")
    assert status.collective == 34
    assert wrote - 5 < status.beat <= wrote <= time.monotonic()  # one clock for all processes of a host
    assert wrote - 5 < status.changed <= wrote
    assert process.returncode == -signal.SIGKILL


def test_only_this_user_can_open_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_of_many_that_claim_at_once_one_does(path: Path) -> None:
    start = time.time() + 3
    body = f"""
        time.sleep(max(0, {start} - time.time()))
        print(int(table.claim(7)))
    """
    processes = [other_process(path, number, body) for number in range(4)]
    claims = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(claims) == ["0", "0", "0", "1"]
    table = RankStatusTable(path, 8, 0)
    assert (table.claimed, table.exit_code) == (Claim.claimed, 7)
    assert not table.claim(1)
    table.told("why, ü")
    assert (table.claimed, table.exit_code, table.cause) == (Claim.told, 7, "why, ü")


def test_a_rank_that_is_done_says_so(path: Path) -> None:
    table = RankStatusTable(path, 8, 2)
    assert table.statuses() == []
    table.enter(2, 1)
    assert [(status.rank, status.pid, status.state) for status in table.statuses()] == [(2, os.getpid(), State.running)]
    table.leave()
    assert [status.state for status in table.statuses()] == [State.done]


def test_a_row_is_never_read_empty_while_another_process_writes_it() -> None:
    path = make_table_file(2)
    writer, reader = RankStatusTable(path, 2, 0), RankStatusTable(path, 2, 1)
    writer.enter(0, 0)
    writer.reached(5, "forward", 0, 1, 600.0)
    child = os.fork()
    if child == 0:
        for number in range(300_000):
            writer.reached(5, "forward", number, 1, 600.0)
        os._exit(0)
    found = set()
    while not os.waitpid(child, os.WNOHANG)[0]:
        found |= {(status.step, status.phase, status.allowed) for status in reader.statuses()}
    path.unlink()
    assert found == {(5, "forward", 600.0)}
