"""How fast the network between the nodes is, measured in a fraction of a second before the training."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tunesmith.train.ranks.distributed import World, barrier, gather_floats, max_over_ranks
from tunesmith.train.watch.node_facts import Sick

CPU_BYTES, GPU_BYTES = 4 * 2**20, 64 * 2**20  # large enough that the start of a collective is a small part of it
SECONDS = 0.3  # for the repeats of the all-reduce
MAX_REPEATS = 10
ROUNDS = 5  # of pairs: each node meets so many others, so that fewer slow ones do not make it look slow
SLOW = 0.5  # of the median node's best pair


@dataclass(frozen=True)
class Speed:
    """Of an all-reduce over all ranks: the fastest of its repeats, as what slows down a network is always there."""

    size: int  # bytes
    ranks: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes a second through the busiest link, as nccl-tests' bus bandwidth: 2 (n - 1) / n of the size."""
        return self.size * 2 * (self.ranks - 1) / self.ranks / self.seconds / 1e9

    def __str__(self) -> str:
        what = f"all-reduce of {self.size / 2**20:g} MiB over {self.ranks} ranks"
        return f"{what} at {self.gigabytes_per_second:.3g} GB/s"


def of_all_reduce(world: World, device: torch.device) -> Speed:
    """Every rank calls it; the same on every rank."""
    tensor = torch.zeros((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    _timed_all_reduce(tensor)  # the first one makes the connections
    fastest = _timed_all_reduce(tensor)
    for _ in range(min(MAX_REPEATS, int(SECONDS / fastest))):
        fastest = min(fastest, _timed_all_reduce(tensor))
    return Speed(tensor.nbytes, world.world_size, fastest)


def _timed_all_reduce(tensor: torch.Tensor) -> float:
    """Seconds, of the rank that took longest."""
    barrier()
    _wait_for_gpu(tensor)
    began = time.perf_counter()
    dist.all_reduce(tensor)
    _wait_for_gpu(tensor)
    return max_over_ranks(time.perf_counter() - began, tensor.device)


def of_pairs(world: World, device: torch.device) -> list[float]:
    """For each node, the 10^9 bytes a second between it and the best of those it was paired with."""
    best = 0.0
    tensor = torch.zeros((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    for partners in rounds(world.num_nodes):
        barrier()
        partner = partners.get(world.node_rank)
        if world.local_rank == 0 and partner is not None:
            best = max(best, _between(world, partner, tensor))
    of_ranks = gather_floats(torch.tensor([[best]], dtype=torch.float64, device=device))
    return [float(value) for value in of_ranks[:: world.local_world_size, 0].cpu()]


def rounds(num_nodes: int) -> list[dict[int, int]]:
    """Who is whose partner in each round: each node has another one in each, or none where their number is odd."""
    seats: list[int | None] = [*range(num_nodes), *([None] if num_nodes % 2 else [])]
    found = []
    for _ in range(min(ROUNDS, len(seats) - 1)):
        partners: dict[int, int] = {}
        for one, other in zip(seats, reversed(seats), strict=True):
            if one is not None and other is not None:
                partners[one] = other
        found.append(partners)
        seats.insert(1, seats.pop())
    return found


def _between(world: World, partner: int, tensor: torch.Tensor) -> float:
    """10^9 bytes a second, there and back, after once for the connection."""
    peer = partner * world.local_world_size
    for _ in range(2):
        _wait_for_gpu(tensor)
        began = time.perf_counter()
        if world.node_rank < partner:
            dist.send(tensor, peer)
            dist.recv(tensor, peer)
        else:
            dist.recv(tensor, peer)
            dist.send(tensor, peer)
        _wait_for_gpu(tensor)
        seconds = time.perf_counter() - began
    return 2 * tensor.nbytes / seconds / 1e9


def slow_nodes(names: Sequence[str], best: Sequence[float]) -> list[Sick]:
    """Those far below the others; none where that cannot be told, as with two nodes, or where all are slow."""
    usual = statistics.median(best)
    return [
        Sick(name, f"{speed:.3g} GB/s at best with another node, the others have {usual:.3g}.", "leave the node out.")
        for name, speed in zip(names, best, strict=True)
        if len(names) > 2 and speed < SLOW * usual
    ]


def _wait_for_gpu(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
