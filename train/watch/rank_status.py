"""What each rank of a node is doing, in memory that outlives any of them.

One file of shared memory a node, with a row for each of its ranks; unlinked as soon as all have opened it: from then
on nothing is left behind however they end (a kill before that leaves a small file in /dev/shm). A rank writes its own
row and reads all: the watchdog (watchdog.py) finds out from it who died, where, and whom the others wait for. The
clock is the monotonic one, which all processes of a host share.

    header | claimed, exit code, cause
    row    | pid rank state stacks_fd | step num_changes timeout_kind changed allowed phase | beat collective
"""

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

HEADER = struct.Struct("=qq")
LINE = struct.Struct("=900s")
IDENTITY = struct.Struct("=qqqq")
PLACE = struct.Struct("=qqqdd64s")
BEAT = struct.Struct("=dq")
LINE_AT, HEADER_BYTES = 16, 1024
IDENTITY_AT, PLACE_AT, BEAT_AT, ROW_BYTES = 0, 32, 136, 192
LOCK_SECONDS = 1.0  # for the lock of the claim, held for microseconds unless its holder was stopped


class State(IntEnum):
    absent = 0
    running = 1
    done = 2  # it has nothing more to do: its end is no failure


class Claim(IntEnum):
    none = 0
    claimed = 1  # a rank is about to tell what happened
    told = 2  # it has: the others can end


@dataclass(frozen=True)
class RankStatus:
    """One rank as the table shows it. changed and beat are monotonic seconds, allowed the seconds a phase may take."""

    rank: int
    pid: int
    state: State
    stacks_fd: int
    step: int
    num_changes: int
    timeout_kind: int
    changed: float
    allowed: float
    phase: str
    beat: float
    collective: int

    @property
    def where(self) -> str:
        return f"at step {self.step}, in {self.phase}"


class RankStatusTable:
    """The ranks of this node, opened by the rank with this local_rank. Raises OSError when it cannot be opened."""

    def __init__(self, path: Path, num_ranks: int, local_rank: int) -> None:
        self._num_ranks = num_ranks
        self._offset = HEADER_BYTES + local_rank * ROW_BYTES
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._memory = mmap.mmap(self._fd, table_bytes(num_ranks))
        self._lock = threading.Lock()

    def enter(self, rank: int, stacks_fd: int) -> None:
        """This process takes its row; from now on its end is a failure until it is done."""
        self._put(IDENTITY, IDENTITY_AT, os.getpid(), rank, State.running, stacks_fd)

    def leave(self) -> None:
        """This rank has nothing more to do."""
        pid, rank, _, stacks_fd = self._get(IDENTITY, self._offset + IDENTITY_AT)
        self._put(IDENTITY, IDENTITY_AT, pid, rank, State.done, stacks_fd)

    def reached(self, step: int, phase: str, num_changes: int, timeout_kind: int, allowed: float) -> None:
        """This rank is in a phase from now on."""
        text = phase.encode()[:64]
        self._put(PLACE, PLACE_AT, step, num_changes, timeout_kind, time.monotonic(), allowed, text)

    def beat(self, collective: int) -> None:
        """This process still runs Python; its main thread has issued so many collectives."""
        self._put(BEAT, BEAT_AT, time.monotonic(), collective)

    def statuses(self) -> list[RankStatus]:
        """Every rank of the node that has entered."""
        every = [self._status_at(HEADER_BYTES + number * ROW_BYTES) for number in range(self._num_ranks)]
        return [status for status in every if status.state is not State.absent]

    def _status_at(self, at: int) -> RankStatus:
        pid, rank, state, stacks_fd = self._get(IDENTITY, at + IDENTITY_AT)
        step, num_changes, kind, changed, allowed, phase = self._get(PLACE, at + PLACE_AT)
        beat, collective = self._get(BEAT, at + BEAT_AT)
        text = phase.rstrip(b"\0").decode(errors="replace")
        return RankStatus(
            rank, pid, State(state), stacks_fd, step, num_changes, kind, changed, allowed, text, beat, collective
        )

    def claim(self, exit_code: int) -> bool:
        """True for the one process of the node that may tell what happened."""
        with self._lock, self._locked_between_processes():
            if self.claimed is not Claim.none:
                return False
            self._write(0, HEADER.pack(Claim.claimed, exit_code))
            return True

    def told(self, line: str) -> None:
        """What happened has been told: the others end at once."""
        self._write(LINE_AT, LINE.pack(line.encode()[: LINE.size]))
        self._write(0, HEADER.pack(Claim.told, self.exit_code))

    @property
    def claimed(self) -> Claim:
        return Claim(self._get(HEADER, 0)[0])

    @property
    def exit_code(self) -> int:
        """Of the claim: what every rank ends with."""
        return int(self._get(HEADER, 0)[1])

    @property
    def cause(self) -> str:
        """The line that was told."""
        return str(self._get(LINE, LINE_AT)[0].rstrip(b"\0").decode(errors="replace"))

    @contextlib.contextmanager
    def _locked_between_processes(self) -> Iterator[None]:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _put(self, layout: struct.Struct, at: int, *values: object) -> None:
        self._write(self._offset + at, layout.pack(*values))

    def _write(self, at: int, packed: bytes) -> None:
        """Not by pack_into(), which fills the place with zeros first: another process may read them."""
        self._memory[at : at + len(packed)] = packed

    def _get(self, layout: struct.Struct, at: int) -> tuple:
        return layout.unpack_from(self._memory, at)


def table_bytes(num_ranks: int) -> int:
    return HEADER_BYTES + num_ranks * ROW_BYTES


def make_table_file(num_ranks: int) -> Path:
    """An empty table that only this user can open, in memory where the system has a place for that."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    handle, name = tempfile.mkstemp(prefix="tunesmith-ranks-", dir=folder)
    os.ftruncate(handle, table_bytes(num_ranks))
    os.close(handle)
    return Path(name)
