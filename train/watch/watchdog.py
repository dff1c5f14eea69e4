"""Watches over the ranks of a run: one that dies or hangs takes the run down in seconds, with one line that says why.

A thread in every rank looks at all ranks of its node several times a second. The first to see something claims the
right to tell, so that it is told once: the cause on stderr, failure.json, the stacks of all threads when a rank hangs.
Then every rank ends; those that cannot by themselves are killed.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from tunesmith.train.errors import EXIT_STOPPED, TunesmithError
from tunesmith.train.files.fence import Superseded
from tunesmith.train.ranks.distributed import World, barrier, num_collectives
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import Progress, progress
from tunesmith.train.ranks.stop import end
from tunesmith.train.watch import cause as causes
from tunesmith.train.watch.cause import Cause
from tunesmith.train.watch.failure import (
    RunFiles,
    collect_stacks,
    forget_failure,
    is_lost_peer,
    register_stacks,
    say,
    traceback_of,
    write_failure,
)
from tunesmith.train.watch.nodes import Nodes
from tunesmith.train.watch.rank_status import Claim, RankStatus, RankStatusTable, State, make_table_file
from tunesmith.train.watch.timeouts import Timeouts

INTERVAL = 0.25  # seconds between two looks
AGAIN_SECONDS = 0.05  # until a rank that seems to hang is looked at again
OWN_GAP = 2.0  # seconds without a look of its own: this process was held up, and what it sees is old
RANK_0_FIRST = 1.0  # where all ranks meet the same mistake, rank 0 says it
LOST_PEER_SECONDS = 5.0  # for the rank that is the reason to say so, or to be found dead
TELL_SECONDS = 8.0  # for the rank that claimed to have told
CLOSE_SECONDS = 3.0  # for rank 0 to close its tracker, while the others and the launcher wait
CLOSE_SECONDS_ALONE = 45.0  # the same where nobody waits: as long as the tracker allows itself
END_SECONDS = 5.0  # for the other ranks to end by themselves

NO_WORD = "another rank failed; failure.json says which"

Closing = Callable[[str], None]


class Watchdog:
    """Of this rank. The first is made once the process group is up; every rank makes it at the same time.

    Args:
        closing: rank 0 calls it with the cause before it ends, from another thread.
    """

    def __init__(self, world: World, timeouts: Timeouts, store: dist.Store, closing: Closing) -> None:
        self.world = world
        self._timeouts = timeouts
        self._closing = closing
        self._files: RunFiles | None = None
        self._mine = False  # this process has claimed
        self._over = threading.Event()
        self._first_step: int | None = None
        self._stacks = register_stacks()
        self._table = _open_table(world, store)
        self._oom_kills = causes.num_oom_kills()
        self._table.beat(0)
        self._reached(progress)
        self._table.enter(world.rank, self._stacks.fileno())
        progress.listeners.append(self._reached)
        barrier()
        self._pidfds: dict[int, RankStatus] = {}
        self._poll = select.poll()
        self._nodes = Nodes(world, store, self._over) if world.num_nodes > 1 else None
        self._watch_over(self._table.statuses())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def use_folder(self, folder: Path, name: str) -> None:
        """The run folder is there, and this run's own."""
        self._files = RunFiles(folder, name)
        if self.world.rank == 0:
            forget_failure(folder)

    def superseded(self, lost: Superseded) -> None:
        """A newer attempt has the run folder: this one ends, and leaves nothing there. From any thread.

        Nor does it close the tracker: the run in W&B is the newer attempt's, and has not failed.
        """
        self._closing = lambda line: None
        self._tell(Cause(self.world.rank, progress.step, progress.phase, "superseded", lost.what))

    def leave(self) -> None:
        """This rank has nothing more to do, or ends in a way that is no failure."""
        self._table.leave()
        if self._reached in progress.listeners:
            progress.listeners.remove(self._reached)
        self._over.set()

    def fail(self, error: Exception) -> NoReturn:
        """Ends the run because this rank raised; quietly when the error only says that another rank is gone."""
        where = (self.world.rank, self.world.world_size, progress.step, progress.phase)
        cause = causes.error(*where, error)
        if isinstance(error, TunesmithError):
            if self.world.rank > 0:
                self._wait_for_claim(RANK_0_FIRST)
            # Input that has been trained on can be run: what goes wrong then may not go wrong at the next attempt.
            self.tell(cause, f"{error}\n", exit_code=error.exit_code if self._first_step is None else 1)
        if is_lost_peer(error):
            self._wait_for_claim(LOST_PEER_SECONDS)
            self._tell_lost()
        trace = traceback_of(error)
        self.tell(cause, f"{trace}{cause.line}\n", trace=trace)

    def _tell_lost(self) -> None:
        """Says so when the peer that was lost is on another node, none of whose ranks is left to tell."""
        now = time.monotonic()
        gone = [
            status
            for status in (self._nodes.statuses() if self._nodes else [])
            if now - status.beat > causes.BEAT_IS_STALE
        ]
        if gone:
            names = self._nodes.names() if self._nodes else {}
            self._tell(causes.lost(gone[0], self.world.world_size, now, names))

    def _wait_for_claim(self, seconds: float) -> None:
        """Gives another rank so long to claim."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._table.claimed is Claim.none:
            time.sleep(0.02)

    def tell(self, cause: Cause, said: str, *, exit_code: int = 1, trace: str = "") -> NoReturn:
        """Says why the run ends, unless another rank does, and ends this process."""
        if not self._claim(exit_code):
            self._follow()
        stacks = collect_stacks(self._running(), self._files) if cause.kind == "hang" else None
        say(said + (f"  stacks: {stacks}\n" if stacks else ""))
        write_failure(self._files, cause, self.world.world_size, trace, stacks)
        self._table.told(cause.line)
        if self._nodes:
            self._nodes.tell(cause.line, exit_code)
        self._end_others(cause)
        self._end(exit_code)

    def _claim(self, exit_code: int) -> bool:
        if not self._table.claim(exit_code):
            return False
        self._mine = True
        if self._nodes and not self._nodes.claim():
            self._table.told(NO_WORD)  # another node is telling
            return False
        return True

    def _follow(self) -> NoReturn:
        """Another rank tells: ends as soon as it has."""
        deadline = time.monotonic() + TELL_SECONDS
        while self._table.claimed is not Claim.told and time.monotonic() < deadline:
            time.sleep(0.02)
        self._end(self._table.exit_code)

    def _end(self, exit_code: int) -> NoReturn:
        """Python's own way out would wait for threads, and the process group for ranks that are gone."""
        closing = threading.Thread(target=self._close, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS if self.world.world_size > 1 else CLOSE_SECONDS_ALONE)
        end(exit_code, self._table.cause)

    def _close(self) -> None:
        if self.world.rank == 0:
            with contextlib.suppress(Exception):
                self._closing(self._table.cause or NO_WORD)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    def _end_others(self, cause: Cause) -> None:
        """Waits for the other ranks of the node to end; kills the one that hangs, and who is still there."""
        deadline = time.monotonic() + END_SECONDS
        for pidfd, status in self._pidfds.items():
            if cause.kind == "hang" and status.rank == cause.rank:
                _kill(pidfd)
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        for pidfd in self._alive():
            _kill(pidfd)

    def _alive(self) -> list[int]:
        done = {status.rank for status in self._table.statuses() if status.state is State.done}
        return [pidfd for pidfd, status in self._pidfds.items() if status.rank not in done and not _has_ended(pidfd)]

    def _reached(self, now: Progress) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a thread that writes in the background does not say where the rank is
        if now.phase is Phase.reading_data and self._first_step is None:
            self._first_step = now.step
        started = self._first_step is not None and now.step > self._first_step
        kind = self._timeouts.kind(now.phase, started=started)
        self._table.reached(now.step, now.phase, now.num_changes, kind, self._timeouts.seconds(kind))

    def _watch_over(self, statuses: list[RankStatus]) -> None:
        for status in statuses:
            if status.pid == os.getpid():
                continue
            try:
                pidfd = os.pidfd_open(status.pid)
            except OSError:  # gone already, which the others notice; or a kernel or sandbox without them
                continue
            self._pidfds[pidfd] = status
            self._poll.register(pidfd, select.POLLIN)

    def _watch(self) -> None:
        looked = awake_since = time.monotonic()
        while not self._over.is_set():
            ended = [pidfd for pidfd, _ in self._poll.poll(1000 * INTERVAL)]
            now = time.monotonic()
            if now - looked > OWN_GAP:
                awake_since = now  # stopped, or held up by C code: the others get their time again
            looked = now
            self._table.beat(num_collectives())
            if self._over.is_set() or self._mine:
                return
            if self._table.claimed is not Claim.none:
                self._follow()
            self._look_for_dead(ended)
            self._look_for_hang(now, awake_since)
            if self._nodes and self.world.local_rank == 0:
                self._look_at_nodes(now)

    def _look_for_dead(self, ended: list[int]) -> None:
        for pidfd in ended:
            self._poll.unregister(pidfd)
            rank = self._pidfds[pidfd].rank
            status = next(status for status in self._table.statuses() if status.rank == rank)
            if status.state is State.done:
                continue
            exit_status = causes.wait_status(status.pid)
            if exit_status == EXIT_STOPPED << 8:
                continue  # it was asked to end before there was anything to save, and told us too
            oom_kills = causes.num_oom_kills() - self._oom_kills
            self._tell(causes.death(status, self.world.world_size, exit_status, oom_kills))

    def _look_for_hang(self, now: float, awake_since: float) -> None:
        late = [status for status in self._running() if now - max(status.changed, awake_since) > status.allowed]
        if late:
            time.sleep(AGAIN_SECONDS)  # a row may have been read while it was written
            running = self._running()
            unmoved = {(status.rank, status.num_changes) for status in running if now - status.changed > status.allowed}
            late = [status for status in late if (status.rank, status.num_changes) in unmoved]
        if late:
            states = {status.rank: causes.process_state(status.pid) for status in running}
            others = self._nodes.statuses() if self._nodes else []
            names = self._nodes.names() if self._nodes else {}
            cause = causes.hang(late[0], running + others, self.world.world_size, time.monotonic(), states, names)
            if cause is not None:
                self._tell(cause)

    def _look_at_nodes(self, now: float) -> None:
        assert self._nodes is not None
        self._nodes.exchange(self._table.statuses(), now)
        told = self._nodes.told()
        if told is not None and self._table.claim(told[0]):
            self._table.told(told[1])
            self._end(told[0])

    def _running(self) -> list[RankStatus]:
        return [status for status in self._table.statuses() if status.state is State.running]

    def _tell(self, cause: Cause) -> NoReturn:
        self.tell(cause, f"{cause.line}\n")


def _open_table(world: World, store: dist.Store) -> RankStatusTable:
    """The table of this node: its first rank makes the file, and removes it once all have opened it."""
    key = f"tunesmith/ranks/{world.node_rank}"
    if world.local_rank == 0:
        path = make_table_file(world.local_world_size)
        store.set(key, str(path))
    table = RankStatusTable(Path(store.get(key).decode()), world.local_world_size, world.local_rank)
    barrier()
    if world.local_rank == 0:
        path.unlink()
    return table


def _kill(pidfd: int) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
