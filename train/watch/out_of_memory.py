"""Out of memory in one message: on which rank, in which phase, how much was in use, and what would help this config."""

import os
import resource

import psutil
import torch

from tunesmith.train.config.config import AdapterKind, Config, Kernels, Offload
from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import progress

NUM_REMEDIES = 3
HOST = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",
)


def explained(error: BaseException, config: Config, world: World) -> TrainingError | None:
    """The error in our words when it is a lack of memory; else None."""
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    if not on_gpu and not is_host_memory(error):
        return None
    reason = " ".join(str(error).split())
    peak = gpu_peak() if on_gpu else host_peak()
    return TrainingError(
        f"rank {world.rank} of {world.world_size} ran out of {'GPU' if on_gpu else 'host'} memory at step "
        f"{progress.step}, in {progress.phase}: {peak}." + (f" {reason[:200]}" if reason else ""),
        do="; or ".join(remedies(config, world, phase=progress.phase, on_gpu=on_gpu)[:NUM_REMEDIES]) + ".",
    )


def is_host_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in HOST)
    )


def gpu_peak() -> str:
    _, total = torch.cuda.mem_get_info()
    return f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of {total / 2**30:.1f} GiB"


def host_peak() -> str:
    """Resident peak of this process, and the smallest limit it stands under."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = psutil.virtual_memory().total
    if address_space != resource.RLIM_INFINITY and address_space < total:
        return f"peak {peak:.1f} GiB resident, address space limited to {address_space / 2**30:.1f} GiB (ulimit -v)"
    return f"peak {peak:.1f} GiB of {total / 2**30:.1f} GiB on this host, which {os.cpu_count()} CPUs share"


def remedies(config: Config, world: World, *, phase: Phase, on_gpu: bool) -> list[str]:
    """Settings that would help, the likeliest first; those already in use are left out."""
    on_device = on_gpu or not torch.cuda.is_available()  # the model lives in the memory that ran out
    found: list[str] = []
    if phase in (Phase.evaluating, Phase.generating) and config.evaluate.batch_size > 1:
        found.append(f"evaluate.batch_size={config.evaluate.batch_size // 2}")
    if not on_device:
        return found + _for_host_beside_gpu(config, world)
    batch, engine = config.batch, config.engine
    if batch.micro_batch_size > 1:
        smaller = next(n for n in range(batch.micro_batch_size // 2, 0, -1) if batch.micro_batch_size % n == 0)
        found.append(f"batch.micro_batch_size={smaller} (the same updates, in more forwards)")
    if (config.memory.recompute or 0) < 1:
        found.append("memory=recompute (computes activations again, about a third slower)")
    if config.kernels is Kernels.off:
        found.append("kernels=auto (the loss without holding the logits)")
    if engine.stage < 3 and world.world_size > 1:
        found.append(f"engine=zero{engine.stage + 1} (shards {SHARDED[engine.stage + 1]} over the ranks)")
    if on_gpu and engine.stage > 0 and engine.offload_optimizer is Offload.none:
        found.append("engine.offload_optimizer=cpu (keeps the optimizer state in host memory)")
    if config.adapter.kind is AdapterKind.none:
        found.append("adapter=lora (no optimizer state for the base weights)")
    if on_gpu and engine.stage == 3 and engine.offload_weights is Offload.none:
        found.append("engine.offload_weights=cpu")
    if str(engine.precision) == "fp32":
        found.append("engine.precision=bf16")
    if batch.sequence_length > 256:
        found.append(f"batch.sequence_length={batch.sequence_length // 2} (longer records are cut)")
    return [*found, "more ranks, or a smaller model", "a smaller adapter.r" if has_adapter(config) else "fewer layers"]


SHARDED = {1: "optimizer state", 2: "gradients too", 3: "weights too"}


def has_adapter(config: Config) -> bool:
    return config.adapter.kind is not AdapterKind.none


def _for_host_beside_gpu(config: Config, world: World) -> list[str]:
    found = []
    if config.engine.offload_optimizer is Offload.cpu:
        found.append("engine.offload_optimizer=none")
    if config.engine.offload_weights is Offload.cpu:
        found.append("engine.offload_weights=none")
    if world.local_world_size > 1:
        found.append(f"fewer ranks on this machine than {world.local_world_size}, each of which loads the model")
    if not has_adapter(config):
        found.append("adapter=lora (checkpoints and the optimizer state shrink)")
    return [*found, "a job with more host memory (--mem of sbatch)", "a smaller model"]
