"""Ranks: who am I, how do I meet the others, and the few reductions the run needs."""

import os
import socket
import subprocess
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tunesmith.train.config.config import Device
from tunesmith.train.errors import ConfigError
from tunesmith.train.ranks.rendezvous import meet


@dataclass(frozen=True)
class World:
    """All processes of the run, and this one's place among them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size


def world_from_environment() -> World:
    """Ranks as deepspeed, torchrun or srun tell them; one process without any. Touches no network and no GPU."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        size = int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", 0))
        return World(int(env["RANK"]), size, local, int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", size))))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        size = int(env["SLURM_STEP_NUM_TASKS"])
        per_node = size // int(env.get("SLURM_STEP_NUM_NODES", 1))
        return World(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), per_node)
    return World()


def choose_device(device: Device, world: World) -> torch.device:
    """The device of this rank. Raises ConfigError when GPUs are asked for and not there; creates no CUDA context."""
    available = torch.cuda.device_count()
    if device is Device.cpu or (device is Device.auto and available == 0):
        return torch.device("cpu")
    if available == 0:
        raise ConfigError(
            "cluster.device=cuda, but no GPU is visible.", key="cluster.device", do="set cluster.device=cpu."
        )
    if world.local_world_size > available:
        raise ConfigError(
            f"{world.local_world_size} ranks were started on {socket.gethostname()}, which has {available} GPU(s).",
            at="the launcher's --num_gpus or --nproc_per_node",
            do=f"start {available} rank(s) per node, or set cluster.device=cpu.",
        )
    return torch.device("cuda", world.local_rank)


def start(
    world: World, device: torch.device, timeout_minutes: float, *, start_minutes: float | None = None
) -> dist.Store:
    """Meets the other ranks: NCCL on GPUs, gloo on CPUs. One process meets itself, through no network.

    Args:
        timeout_minutes: after which a collective fails.
        start_minutes: that ranks wait for each other to come; None: as for a collective.
    Returns: the store that all ranks share.
    Raises: TrainingError when the port is taken or a rank does not come.
    """
    env = os.environ
    env.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(world.local_rank))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in env:  # ranks that each take every core fight for them, at a tenth of the speed
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.world_size > 1 and "MASTER_ADDR" not in env:
        env["MASTER_ADDR"], env["MASTER_PORT"] = _slurm_rendezvous()
    store: dist.Store = dist.HashStore()
    if world.world_size > 1:
        store = meet(world.rank, world.world_size, start_minutes or timeout_minutes, backend)
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    return store


def _slurm_rendezvous() -> tuple[str, str]:
    """First host of the job step, and a port out of 20000 to 29999 by job id, restart and step.

    Another one for each start: ranks of the last one may still hold theirs on a node that was cut off.
    """
    env = os.environ
    nodes = env["SLURM_STEP_NODELIST"]
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
    )
    start = 101 * int(env.get("SLURM_RESTART_COUNT", "0")) + 13 * int(env.get("SLURM_STEP_ID", "0"))
    return listed.stdout.split()[0], str(20000 + (int(env["SLURM_JOB_ID"]) + start) % 10000)


def num_collectives() -> int:
    """How many collectives this process has issued, over all process groups; any thread may ask.

    DeepSpeed makes groups of its own. The names are torch's inner ones: 0 where a torch has others.
    """
    try:
        groups = list(dist.distributed_c10d._world.pg_names)
        return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return 0


def use_timeout(timeout_minutes: float) -> None:
    """For the groups that DeepSpeed made: they come with torch's own 10 or 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_names):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def numbers_on(device: torch.device, numbers: list[float]) -> torch.Tensor:
    """Numbers as float64 on a device, copied without waiting for it."""
    is_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.float64, pin_memory=is_cuda).to(device, non_blocking=is_cuda)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, in place; the same on every rank. Does not wait for the GPU."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(value: float, device: torch.device) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def all_ranks(ok: bool, device: torch.device) -> bool:
    """True when every rank passes True."""
    return max_over_ranks(0.0 if ok else 1.0, device) == 0.0


def broadcast_text(text: str | None, device: torch.device) -> str:
    """Rank 0's text on every rank, as bytes: no object collective, no pickle."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return text or ""
    payload = (text or "").encode()
    length = torch.tensor(len(payload), dtype=torch.int64, device=device)
    dist.broadcast(length, src=0)
    if dist.get_rank() == 0:
        data = torch.tensor(list(payload), dtype=torch.uint8, device=device)
    else:
        data = torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return bytes(data.cpu().tolist()).decode()


def first_problem(problem: str, device: torch.device) -> str:
    """The problem of the first rank that has one, with its number; empty when none has. The same on every rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return problem
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first = world_size - 1 - int(max_over_ranks(world_size - 1 - rank if problem else -1, device))
    if first == world_size:
        return ""
    text = f"rank {rank}: {problem}"[:500].encode().ljust(2000, b"\0")
    data = torch.tensor(list(text), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=first)
    return bytes(data.cpu().tolist()).rstrip(b"\0").decode()


def gather_floats(rows: torch.Tensor) -> torch.Tensor:
    """Rows of every rank, [n, k] of the same n and dtype on each, stacked in rank order: [world_size * n, k]."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def gather_texts(text: str, device: torch.device) -> list[str]:
    """A text of every rank, in rank order, as bytes: no object collective, no pickle. Every rank calls it."""
    payload = text.encode()
    lengths = gather_floats(torch.tensor([[len(payload)]], dtype=torch.int64, device=device)).flatten().tolist()
    padded = payload.ljust(max(lengths), b"\0")
    rows = gather_floats(torch.tensor([list(padded)], dtype=torch.uint8, device=device)).cpu()
    return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]
