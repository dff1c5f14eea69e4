"""Block sizes of the LoRA kernels.

A block is chosen by kernel and by the number of ranks that a program holds, a power of two. Candidates for sm_80 stay
under the 99 KiB of shared memory that consumer GPUs of its family have. None spills: `make kernels-report`.
"""

import torch

from tunesmith.kernels import blocks
from tunesmith.kernels.blocks import Block, Table, block
from tunesmith.kernels.device import arch

RANK_STEP = 16  # the narrowest side of a matrix instruction: ranks are stored padded to a multiple of it
MOST_RANKS = {90: 128, 80: 128, 0: 32}  # in one program; more go in slices
MOST_FLOAT32_RANKS = 32  # 64 spill
BUCKETS = 16, 32, 64, 128
SUM_BLOCK = 1024
DROP_BLOCK = block(8, 2, BLOCK_N=16, BLOCK_K=256)

INTERPRETER = {
    "down": [block(BLOCK_N=16, BLOCK_K=32)],
    "up": [block(BLOCK_N=16, BLOCK_O=32)],
    "grad_up": [block(BLOCK_N=16, BLOCK_O=32)],
    "grad_down": [block(BLOCK_N=16, BLOCK_K=32)],
}
# float32 on a GPU: without tensor cores, and a tile is twice as many bytes.
FLOAT32 = {
    "down": block(4, 2, BLOCK_N=32, BLOCK_K=32),
    "up": block(8, 2, BLOCK_N=32, BLOCK_O=32),
    "grad_up": block(8, 2, BLOCK_N=32, BLOCK_O=32),
    "grad_down": block(8, 2, BLOCK_N=32, BLOCK_K=32),
}
# Sizes or addresses that are no multiples of 16: no vectors, no asynchronous copies, and registers for each element.
ODD = {
    "down": block(8, 2, BLOCK_N=32, BLOCK_K=64),
    "up": block(8, 2, BLOCK_N=32, BLOCK_O=64),
    "grad_up": block(8, 2, BLOCK_N=32, BLOCK_O=64),
    "grad_down": block(8, 2, BLOCK_N=32, BLOCK_K=64),
}
# down: a row block is one program, about one for each multiprocessor, so many warps and deep prefetch.
# grad_up, grad_down: the accumulators stay in registers over a chunk of rows.
HOPPER: dict[str, dict[int, list[Block]]] = {
    "down": {
        16: [block(8, 4, BLOCK_N=64, BLOCK_K=128), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        32: [block(8, 4, BLOCK_N=64, BLOCK_K=128), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        64: [block(8, 4, BLOCK_N=64, BLOCK_K=128), block(8, 4, BLOCK_N=64, BLOCK_K=64)],
        128: [block(8, 4, BLOCK_N=64, BLOCK_K=64), block(8, 3, BLOCK_N=128, BLOCK_K=64)],
    },
    "up": {
        16: [block(8, 2, BLOCK_N=128, BLOCK_O=128), block(8, 2, BLOCK_N=64, BLOCK_O=256)],
        32: [block(8, 2, BLOCK_N=128, BLOCK_O=128), block(8, 2, BLOCK_N=64, BLOCK_O=256)],
        64: [block(8, 2, BLOCK_N=128, BLOCK_O=128), block(8, 2, BLOCK_N=64, BLOCK_O=256)],
        128: [block(8, 2, BLOCK_N=128, BLOCK_O=128), block(8, 2, BLOCK_N=64, BLOCK_O=128)],
    },
    "grad_up": {
        16: [block(8, 3, BLOCK_N=64, BLOCK_O=256), block(4, 3, BLOCK_N=64, BLOCK_O=128)],
        32: [block(8, 3, BLOCK_N=64, BLOCK_O=256), block(4, 3, BLOCK_N=64, BLOCK_O=128)],
        64: [block(8, 3, BLOCK_N=64, BLOCK_O=256), block(8, 3, BLOCK_N=64, BLOCK_O=128)],
        128: [block(8, 3, BLOCK_N=64, BLOCK_O=128), block(4, 3, BLOCK_N=64, BLOCK_O=64)],
    },
    "grad_down": {
        16: [block(8, 3, BLOCK_N=64, BLOCK_K=128), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        32: [block(8, 3, BLOCK_N=64, BLOCK_K=128), block(8, 3, BLOCK_N=64, BLOCK_K=64)],
        64: [block(8, 3, BLOCK_N=64, BLOCK_K=128), block(8, 3, BLOCK_N=64, BLOCK_K=64)],
        128: [block(8, 3, BLOCK_N=64, BLOCK_K=64), block(8, 3, BLOCK_N=64, BLOCK_K=128)],
    },
}
OTHER: dict[str, dict[int, list[Block]]] = {
    "down": {
        16: [block(8, 4, BLOCK_N=64, BLOCK_K=64), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        32: [block(8, 4, BLOCK_N=64, BLOCK_K=64), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        64: [block(8, 4, BLOCK_N=64, BLOCK_K=64), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        128: [block(8, 3, BLOCK_N=64, BLOCK_K=64), block(4, 3, BLOCK_N=64, BLOCK_K=32)],
    },
    "up": {
        16: [block(8, 2, BLOCK_N=128, BLOCK_O=128), block(4, 2, BLOCK_N=64, BLOCK_O=128)],
        32: [block(8, 2, BLOCK_N=128, BLOCK_O=128), block(4, 2, BLOCK_N=64, BLOCK_O=128)],
        64: [block(8, 2, BLOCK_N=128, BLOCK_O=128), block(4, 2, BLOCK_N=64, BLOCK_O=128)],
        128: [block(8, 2, BLOCK_N=64, BLOCK_O=128), block(4, 2, BLOCK_N=64, BLOCK_O=64)],
    },
    "grad_up": {
        16: [block(8, 3, BLOCK_N=32, BLOCK_O=256), block(4, 3, BLOCK_N=64, BLOCK_O=128)],
        32: [block(8, 3, BLOCK_N=64, BLOCK_O=256), block(8, 3, BLOCK_N=64, BLOCK_O=128)],
        64: [block(8, 3, BLOCK_N=64, BLOCK_O=128), block(8, 4, BLOCK_N=32, BLOCK_O=256)],
        128: [block(4, 3, BLOCK_N=64, BLOCK_O=64)],
    },
    "grad_down": {
        16: [block(8, 3, BLOCK_N=64, BLOCK_K=128), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        32: [block(8, 3, BLOCK_N=64, BLOCK_K=128), block(4, 4, BLOCK_N=32, BLOCK_K=128)],
        64: [block(8, 3, BLOCK_N=64, BLOCK_K=128), block(8, 3, BLOCK_N=64, BLOCK_K=64)],
        128: [block(8, 3, BLOCK_N=32, BLOCK_K=64), block(8, 3, BLOCK_N=64, BLOCK_K=32)],
    },
}


def bucket(ranks: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many ranks a program holds: the next power of two, up to a limit."""
    most = MOST_FLOAT32_RANKS if dtype is torch.float32 else MOST_RANKS[arch(device)]
    return min(max(RANK_STEP, 1 << (ranks - 1).bit_length()), most)


def choose(
    kernel: str, ranks: int, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...], even: bool
) -> dict[str, int]:
    """Keyword arguments for a launch with a bucket of ranks; even: what it reads is on multiples of 16."""
    if device.type != "cpu" and (dtype is torch.float32 or not even):
        found = (FLOAT32 if dtype is torch.float32 else ODD)[kernel]
    else:
        table: Table = {0: INTERPRETER[kernel], 90: HOPPER[kernel][ranks], 80: OTHER[kernel][ranks]}
        # Without the number of rows, which changes from batch to batch: a timed pick is for a layer.
        found = blocks.choose(f"lora.{kernel}.{ranks}", table, device, shape[1:])
    return {**found.launch, "BLOCK_R": ranks}
