"""How the ranks find each other: the store at MASTER_ADDR:MASTER_PORT, which rank 0 or torchrun opens."""

import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from tunesmith.train.errors import TrainingError

Result = TypeVar("Result")
HERE = "tunesmith/here"
NAMED = 8  # missing ranks named one by one; of more, their number


def meet(rank: int, world_size: int, minutes: float, backend: str) -> dist.Store:
    """The store that all ranks share, once all have come.

    Raises: TrainingError when one does not within the minutes, or has another backend: a process group of both would
    wait for its timeout.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    timeout = timedelta(minutes=minutes)
    try:
        store = interruptible(lambda: _open_store(rank, world_size, timeout))
    except RuntimeError as error:
        raise _no_store(error, rank, place, minutes) from None
    store.set(f"{HERE}/{rank}", f"{backend} {socket.gethostname()}")
    everyone = [f"{HERE}/{other}" for other in range(world_size)]
    try:
        interruptible(lambda: store.wait(everyone, timeout))
    except RuntimeError:
        raise TrainingError(
            _who_is_missing(store, rank, world_size, minutes),
            at=f"the meeting of the ranks at {place}",
            do="look at what those ranks print; cluster.start_timeout_minutes sets how long the others wait.",
            exit_code=1,
        ) from None
    try:
        said = store.multi_get(everyone)
    except RuntimeError:  # rank 0 has found it first, and says it
        what = f"rank 0 ended while rank {rank} met it."
        raise TrainingError(what, at=f"the meeting at {place}", exit_code=1) from None
    _check_backends([value.decode().split(" ", 1) for value in said])
    return store


def _check_backends(ranks: list[list[str]]) -> None:
    """Of each rank its backend and host, in the order of ranks."""
    with_gpu = [rank for rank, (backend, _) in enumerate(ranks) if backend == "nccl"]
    without = [rank for rank in range(len(ranks)) if rank not in set(with_gpu)]
    if with_gpu and without:
        raise TrainingError(
            f"rank {without[0]} on {ranks[without[0]][1]} sees no GPU, and rank {with_gpu[0]} on "
            f"{ranks[with_gpu[0]][1]} does.",
            at="cluster.device",
            do=f"look at nvidia-smi on {ranks[without[0]][1]}, or train on all CPUs with cluster.device=cpu.",
        )


def _open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """As torch's env:// does, but without waiting there for the others: that could not say who is missing."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # its agent has opened it already
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not by_torchrun,
        timeout=timeout,
        wait_for_workers=False,
    )


def _who_is_missing(store: dist.Store, rank: int, world_size: int, minutes: float) -> str:
    try:
        missing = [str(other) for other in range(world_size) if not store.check([f"{HERE}/{other}"])]
    except RuntimeError:
        return f"rank 0 ended while rank {rank} waited with it for the others."
    names = ", ".join(missing) if len(missing) <= NAMED else f"{', '.join(missing[:NAMED])} and others"
    return f"{len(missing)} of {world_size} ranks did not come within {minutes:g} minutes: rank {names}."


def _no_store(error: RuntimeError, rank: int, place: str, minutes: float) -> TrainingError:
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return TrainingError(
            f"port {place.rpartition(':')[2]} is taken by another program.",
            at=f"MASTER_PORT, where rank {rank} waits for the others",
            do="end that program, or choose another port: --master_port of deepspeed and torchrun, or MASTER_PORT.",
            exit_code=1,
        )
    reason = " ".join(str(error).split())[:200]
    return TrainingError(
        f"rank {rank} could not reach rank 0 within {minutes:g} minutes: {reason}",
        at=f"MASTER_ADDR:MASTER_PORT = {place}",
        do="check that rank 0 has started and that the address can be reached from here.",
        exit_code=1,
    )


def interruptible(call: Callable[[], Result]) -> Result:
    """What call returns or raises, from another thread: a signal's handler cannot run while this one is inside it."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return results[0]
