"""What the nodes of a run tell each other through the store: how their ranks are, and who told why the run ends.

A store whose network is cut does not fail: it never answers. So no thread that watches over ranks waits for it: another
one does, and what it has heard last is what is known.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from tunesmith.train.ranks.distributed import World
from tunesmith.train.watch.node_facts import node_name
from tunesmith.train.watch.rank_status import RankStatus, State

EXCHANGE_SECONDS = 1.0
# Between two reads of all nodes' ranks by each node's first rank, and by its others: what is known where the store
# does not answer any more. 64 nodes of 8 ranks ask it some 1,400 times a second so.
READ_SECONDS, OTHERS_READ_SECONDS = 10.0, 60.0
LOOK_SECONDS = 0.25  # between two looks at whether another node has told
ANSWER_SECONDS = 5.0  # for the store to answer
CLAIM, TOLD = "tunesmith/claim", "tunesmith/told"


class Nodes:
    """The other nodes. The store's connections are its own: the main thread may be waiting on the other one.

    Args:
        over: set once this rank has nothing more to do.
    """

    def __init__(self, world: World, store: dist.Store, over: threading.Event) -> None:
        self._world = world
        self._store, self._last_words = store.clone(), store.clone()  # type: ignore[attr-defined]
        self._over = over
        self._mine: tuple[float, list[dict[str, Any]]] | None = None  # wall clock, ranks of this node
        self._heard: dict[int, tuple[float, list[dict[str, Any]], str]] = {}  # by node: the same, and its name
        self._told: tuple[int, str] | None = None
        self._asked, self._answered = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._talk, name="nodes", daemon=True)
        self._thread.start()

    def claim(self) -> bool:
        """True for the one node that tells; also where the store is gone, as nobody else may be there to tell."""
        mine = str(self._world.rank)
        answer = _soon(lambda: self._last_words.compare_set(CLAIM, "", mine))
        return answer is None or bool(answer == mine.encode())

    def tell(self, line: str, exit_code: int) -> None:
        """The other nodes can end."""
        _soon(lambda: self._last_words.set(TOLD, json.dumps([exit_code, line])))

    def told(self) -> tuple[int, str] | None:
        """Exit code and cause, once another node has told."""
        return self._told

    def exchange(self, statuses: list[RankStatus], now: float) -> None:
        """Notes how the ranks of this node are, for the others. Times as seconds ago: clocks differ."""
        rows = [asdict(replace(status, changed=now - status.changed, beat=now - status.beat)) for status in statuses]
        self._mine = (time.time(), rows)

    def statuses(self) -> list[RankStatus]:
        """The running ranks of the other nodes as they last wrote it down, in this host's time.

        How long ago that was is by the hosts' wall clocks; a wrong one can make a cause name another rank, no more.
        """
        self._answered.clear()
        self._asked.set()
        self._answered.wait(ANSWER_SECONDS if self._thread.is_alive() else 0.0)
        now, found = time.monotonic(), list[RankStatus]()
        for written, rows, _ in list(self._heard.values()):
            then = now - max(0.0, time.time() - written)
            statuses = [RankStatus(**row) for row in rows]
            found += [replace(status, changed=then - status.changed, beat=then - status.beat) for status in statuses]
        return [status for status in found if status.state == State.running]

    def names(self) -> dict[int, str]:
        """The node of each rank on another node."""
        return {row["rank"]: name for _, rows, name in list(self._heard.values()) for row in rows}

    def _talk(self) -> None:
        """Until the run is over, or the store is gone with rank 0: collectives fail too then."""
        first = self._world.local_rank == 0
        wrote, read = -EXCHANGE_SECONDS, -OTHERS_READ_SECONDS
        with contextlib.suppress(RuntimeError):
            while not self._over.wait(LOOK_SECONDS):
                now = time.monotonic()
                if first and self._store.check([TOLD]):
                    exit_code, line = json.loads(self._store.get(TOLD))
                    self._told = (int(exit_code), str(line))
                if first and self._mine is not None and now - wrote >= EXCHANGE_SECONDS:
                    wrote = now
                    row = [*self._mine, node_name()]
                    self._store.set(f"tunesmith/node/{self._world.node_rank}", json.dumps(row))
                if self._asked.is_set() or now - read >= (READ_SECONDS if first else OTHERS_READ_SECONDS):
                    read = now
                    self._read()
        self._answered.set()

    def _read(self) -> None:
        for node in range(self._world.num_nodes):
            key = f"tunesmith/node/{node}"
            if node != self._world.node_rank and self._store.check([key]):
                self._heard[node] = tuple(json.loads(self._store.get(key)))
        self._asked.clear()
        self._answered.set()


def _soon(call: Callable[[], Any]) -> Any:
    """What the store answers; None where it is gone, or does not answer soon."""
    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(call())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else None
