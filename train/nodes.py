"""What the nodes of a run tell each other through the store: how their ranks are, and who told why the run ends."""

import contextlib
import json
import time
from dataclasses import asdict, replace

import torch.distributed as dist

from tunesmith.train.board import Slot, State
from tunesmith.train.distributed import World

EXCHANGE_SECONDS = 1.0
CLAIM, TOLD = "tunesmith/claim", "tunesmith/told"


class Nodes:
    """The other nodes. The store is a connection of its own: the main thread may be waiting on the other one."""

    def __init__(self, world: World, store: dist.Store) -> None:
        self._world = world
        self._store = store.clone()  # type: ignore[attr-defined]
        self._exchanged = -EXCHANGE_SECONDS

    def claim(self) -> bool:
        """True for the one node that tells; also where the store is gone, as nobody else may be there to tell."""
        mine = str(self._world.rank)
        try:
            return bool(self._store.compare_set(CLAIM, "", mine) == mine.encode())
        except RuntimeError:
            return True

    def tell(self, line: str, exit_code: int) -> None:
        """The other nodes can end."""
        with contextlib.suppress(RuntimeError):
            self._store.set(TOLD, json.dumps([exit_code, line]))

    def told(self) -> tuple[int, str] | None:
        """Exit code and cause, once another node has told."""
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0: collectives fail too
            if self._store.check([TOLD]):
                exit_code, line = json.loads(self._store.get(TOLD))
                return int(exit_code), str(line)
        return None

    def exchange(self, slots: list[Slot], now: float) -> None:
        """Writes down how the ranks of this node are, about once a second. Times as seconds ago: clocks differ."""
        if now - self._exchanged < EXCHANGE_SECONDS:
            return
        self._exchanged = now
        rows = [asdict(replace(slot, changed=now - slot.changed, beat=now - slot.beat)) for slot in slots]
        with contextlib.suppress(RuntimeError):
            self._store.set(f"tunesmith/node/{self._world.node_rank}", json.dumps([time.time(), rows]))

    def slots(self) -> list[Slot]:
        """The running ranks of the other nodes as they last wrote it down, in this host's time.

        How long ago that was is by the hosts' wall clocks; a wrong one can make a cause name another rank, no more.
        """
        now, found = time.monotonic(), list[Slot]()
        with contextlib.suppress(RuntimeError):
            for node in range(self._world.num_nodes):
                key = f"tunesmith/node/{node}"
                if node != self._world.node_rank and self._store.check([key]):
                    written, rows = json.loads(self._store.get(key))
                    then = now - max(0.0, time.time() - written)
                    slots = [Slot(**row) for row in rows]
                    found += [replace(slot, changed=then - slot.changed, beat=then - slot.beat) for slot in slots]
        return [slot for slot in found if slot.state == State.running]
