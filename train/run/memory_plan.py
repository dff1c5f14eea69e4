"""memory=auto: how many blocks recompute and how many sequences a forward has, the fastest that a GPU can hold.

What is kept for the backward is counted (model/activations.py). The rest follows from what DeepSpeed holds of each
parameter, and from what our loss holds. Activations are not moved to host memory: of Llama 3.1 8B a block keeps about
1.5 GB for 8,192 tokens, which takes 30 ms one way at 50 GB/s, and computing it again takes 5 ms on an H200.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.train.config.config import Config, Kernels, Offload, Precision
from tunesmith.train.model.activations import Activations, predict_activations
from tunesmith.train.model.load import DTYPES
from tunesmith.train.model.recompute import possible_numbers
from tunesmith.train.model.size import ModelSize, model_size
from tunesmith.train.ranks.distributed import World, max_over_ranks
from tunesmith.train.zero.deepspeed_config import reduce_bucket_size, zero_stage

GIB = 2**30
RUNTIME_BYTES = 2 * GIB  # CUDA's context, NCCL's buffers, cuBLAS's workspaces: 1.2 to 2 GiB on an 8-GPU node
FRAGMENTS = 0.06  # of all memory: what the caching allocator cannot use
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
STEP_BYTES = 6  # of each trained element of a rank: a flat copy of its gradients in 16 bits, and one in fp32
LOSS_BYTES = 2**30  # kernels/lce/backends.py, GPU_SLAB_BYTES_TRAINABLE
# Rows of a product at which an H100 or H200 reads a weight as long as it multiplies with it: 790 TFLOP/s over 4.3 TB/s.
ROWS_OF_A_WEIGHT = 184
ROWS_OF_A_GATHERED_WEIGHT = 1_750  # the same where ZeRO 3 fetches it over NVLink: 790 TFLOP/s over 450 GB/s


@dataclass(frozen=True)
class Plan:
    """One way to run, in bytes of one GPU."""

    num_sequences: int
    recomputed: int
    num_blocks: int
    states: int  # weights, gradients, optimizer
    kept: int  # activations
    working: int  # what one block and the loss hold for a moment
    step: int  # what the update holds for a moment, when activations are gone

    @property
    def bytes(self) -> int:
        return RUNTIME_BYTES + self.states + max(self.kept + self.working, self.step)

    def cost(self, sequence_length: int, *, gathered: bool) -> float:
        """Time of a step beside one that recomputes nothing and whose forwards are endless.

        A block that recomputes does a third more. A weight is read for each forward, however few rows it multiplies.
        """
        rows = ROWS_OF_A_GATHERED_WEIGHT if gathered else ROWS_OF_A_WEIGHT
        return 1 + self.recomputed / self.num_blocks / 3 + rows / (self.num_sequences * sequence_length)


def settle_memory(
    config: Config, hf_config: Any, world: World, device: torch.device, note: Callable[[str], None]
) -> None:
    """Writes down in the config what memory.recompute=null comes to; batch.micro_batch_size may become a divisor of it.

    Every rank calls it and gets the same. Without a GPU, or a limit, nothing is recomputed.
    """
    if config.memory.recompute is not None:
        return
    limit = _limit(config, device)
    if limit is None:
        config.memory.recompute = 0.0
        return
    try:
        plans = _plans(config, hf_config, world)
    except Exception as error:  # whatever a model's code makes of tensors without values
        config.memory.recompute = 1.0
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        note(f"memory: every block recomputes, as what this model keeps cannot be counted beforehand ({reason})")
        return
    usable = limit * (1 - FRAGMENTS)
    fitting = [plan for plan in plans if plan.bytes <= usable]
    gathered = zero_stage(config.engine) == 3
    best = (
        min(fitting, key=lambda plan: plan.cost(config.batch.sequence_length, gathered=gathered))
        if fitting
        else min(plans, key=lambda plan: plan.bytes)
    )
    config.memory.recompute = best.recomputed / best.num_blocks
    config.batch.micro_batch_size = best.num_sequences
    note(_described(best, limit, fits=bool(fitting)))


def _limit(config: Config, device: torch.device) -> float | None:
    """Bytes that all ranks may plan with: of the smallest GPU."""
    here = config.memory.limit_gib * GIB if config.memory.limit_gib else float("inf")
    if device.type == "cuda":
        here = min(here, torch.cuda.mem_get_info(device)[1])
    smallest = -max_over_ranks(-here, device)
    return None if smallest == float("inf") else smallest


def _plans(config: Config, hf_config: Any, world: World) -> list[Plan]:
    """Every divisor of the micro batch with every number of blocks that recompute."""
    most, found = config.batch.micro_batch_size, []
    of_one, model = predict_activations(config, hf_config, 1)
    size = model_size(model)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    for num_sequences in (number for number in range(1, most + 1) if most % number == 0):
        activations = of_one.of(num_sequences)
        for recomputed in possible_numbers(model):
            found.append(
                Plan(
                    num_sequences,
                    recomputed,
                    len(activations.blocks),
                    states_bytes(config, size.parameters, trained, world.world_size, num_sequences=num_sequences),
                    activations.kept(recomputed),
                    _working_bytes(config, hf_config, activations, num_sequences, recomputed, size),
                    STEP_BYTES * size.trainable // (world.world_size if zero_stage(config.engine) else 1),
                )
            )
    return found


def states_bytes(
    config: Config, parameters: int, trained: Sequence[int], world_size: int, *, num_sequences: int
) -> int:
    """Weights, gradients and optimizer of one rank, as DeepSpeed 0.19.8 holds them.

    trained: elements of each parameter that is; num_sequences: of a forward.
    """
    engine, stage, total = config.engine, zero_stage(config.engine), sum(trained)
    width = DTYPES[engine.precision].itemsize
    shards = [world_size if stage >= first else 1 for first in (1, 2, 3)]
    weights = 0 if engine.offload_weights is not Offload.none else width * parameters / shards[2]
    gathered = width * min(LIVE_PARAMETERS, parameters) if stage == 3 else 0
    accumulates = config.batch.global_batch_size > num_sequences * world_size
    gradients = (4 if accumulates else width) * total / shards[1]
    buffers = 2 if world_size > 1 else 1
    buckets = buffers * 4 * reduce_bucket_size(trained) if stage and trained else 0
    master = 8 if engine.precision is Precision.fp32 and stage == 0 else 12
    optimizer = 0 if engine.offload_optimizer is not Offload.none else master * total / shards[0]
    return int(weights + gathered + gradients + buckets + optimizer)


def _working_bytes(
    config: Config, hf_config: Any, activations: Activations, num_sequences: int, recomputed: int, size: ModelSize
) -> int:
    """A block's gradients beside what it kept, a block computed again, and the loss."""
    text = hf_config.get_text_config()
    tokens = num_sequences * config.batch.sequence_length
    largest = max(activations.blocks)
    head = 4 * text.vocab_size * text.hidden_size if size.trainable == size.parameters else 0
    width = DTYPES[config.engine.precision].itemsize
    loss = LOSS_BYTES + tokens * text.hidden_size * width
    if config.kernels is Kernels.off:  # whole logits, and their gradients, in the model's format and in float32
        loss = 2 * tokens * text.vocab_size * (width + 4)
    return largest * (2 if recomputed else 1) + head + loss


def _described(plan: Plan, limit: float, *, fits: bool) -> str:
    parts = {"weights, gradients, optimizer": plan.states, "activations": plan.kept, "at work": plan.working}
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    text = (
        f"memory: {plan.bytes / GIB:.1f} of {limit / GIB:.1f} GiB a GPU foreseen ({listed}): {plan.num_sequences} "
        f"sequences a forward, {plan.recomputed} of {plan.num_blocks} blocks recompute"
    )
    return text if fits else f"{text}. That is likely too much: use a higher ZeRO stage, offload, or shorter sequences"
