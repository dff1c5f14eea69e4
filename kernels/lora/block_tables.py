"""Block sizes of the LoRA kernels, and every way they are shipped for the cross-compile report.

A block is chosen by kernel and by the number of ranks that a program holds, a power of two. Candidates for sm_80 stay
under the 99 KiB of shared memory that consumer GPUs of its family have. None spills: `make kernels-report`.
"""

from typing import Any

import torch

from tunesmith.kernels import blocks
from tunesmith.kernels.blocks import Block, Build, Table, block
from tunesmith.kernels.device import arch
from tunesmith.kernels.lora import triton_kernels

RANK_STEP = 16  # the narrowest side of a matrix instruction: ranks are stored padded to a multiple of it
MOST_RANKS = {90: 128, 80: 128, 0: 32}  # in one program; more go in slices
MOST_FLOAT32_RANKS = 32  # 64 spill
BUCKETS = 16, 32, 64, 128
SUM_BLOCK = 1024
DROP_BLOCK = block(8, 2, BLOCK_N=16, BLOCK_K=256)

_INTERPRETED = {
    "down": [block(BLOCK_N=16, BLOCK_K=32)],
    "up": [block(BLOCK_N=16, BLOCK_O=32)],
    "grad_up": [block(BLOCK_N=16, BLOCK_O=32)],
    "grad_down": [block(BLOCK_N=16, BLOCK_K=32)],
}
# float32 on a GPU: without tensor cores, and a tile is twice as many bytes.
FLOAT32 = {
    "down": block(8, 2, BLOCK_N=32, BLOCK_K=32),
    "up": block(8, 2, BLOCK_N=32, BLOCK_O=32),
    "grad_up": block(8, 2, BLOCK_N=32, BLOCK_O=32),
    "grad_down": block(8, 2, BLOCK_N=32, BLOCK_K=32),
}
# down: a row block is one program, about one for each multiprocessor, so many warps and deep prefetch.
# grad_up, grad_down: the accumulators stay in registers over a chunk of rows.
_HOPPER: dict[str, dict[int, list[Block]]] = {
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
_OTHER: dict[str, dict[int, list[Block]]] = {
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
KERNELS = tuple(_HOPPER)


def bucket(ranks: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many ranks a program holds: the next power of two, up to a limit."""
    most = MOST_FLOAT32_RANKS if dtype is torch.float32 else MOST_RANKS[arch(device)]
    return min(max(RANK_STEP, 1 << (ranks - 1).bit_length()), most)


def choose(kernel: str, ranks: int, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> dict[str, int]:
    """Keyword arguments for a launch with a bucket of ranks."""
    if dtype is torch.float32 and device.type == "cuda":
        found = FLOAT32[kernel]
    else:
        table: Table = {0: _INTERPRETED[kernel], 90: _HOPPER[kernel][ranks], 80: _OTHER[kernel][ranks]}
        # Without the number of rows, which changes from batch to batch: a timed pick is for a layer.
        found = blocks.choose(f"lora.{kernel}.{ranks}", table, device, shape[1:])
    return {**found.launch, "BLOCK_R": ranks}


_SCALARS = {"scale": "fp32", "first_row": "i64"}  # the others are int32
_FLAGS: dict[str, list[dict[str, bool]]] = {
    "down": [{"DROP": False}, {"DROP": True}],
    "up": [{"BIAS": False}, {"BIAS": True}],
    "grad_up": [{"DU": True, "DB": True}, {"DU": True, "DB": False}, {"DU": False, "DB": True}],
    "grad_down": [
        {"DROP": False, "DA": True, "DX": True, "ADD": False},
        {"DROP": True, "DA": True, "DX": True, "ADD": False},
        {"DROP": True, "DA": True, "DX": False, "ADD": False},
        {"DROP": True, "DA": False, "DX": True, "ADD": False},
        {"DROP": True, "DA": True, "DX": True, "ADD": True},
    ],
}


def builds() -> list[Build]:
    """Every block with every feature; the rarer features (not the first two) with the default block only."""
    found = []
    for number, table in ((90, _HOPPER), (80, _OTHER)):
        for kernel in KERNELS:
            for ranks in BUCKETS:
                for i, candidate in enumerate(table[kernel][ranks]):
                    for flags in _FLAGS[kernel] if i == 0 else _FLAGS[kernel][:2]:
                        found.append(_build(kernel, candidate, number, "*bf16", ranks, flags))
            found.append(_build(kernel, FLOAT32[kernel], number, "*fp32", MOST_FLOAT32_RANKS, _FLAGS[kernel][-1]))
        found += [_sum_build(number), _drop_build(number)]
    return found


def _build(kernel: str, candidate: Block, number: int, element: str, ranks: int, flags: dict[str, bool]) -> Build:
    function = getattr(triton_kernels, kernel)
    constants: dict[str, Any] = {**flags, "WIDEN": False, "BLOCK_R": ranks}
    signature = {}
    for name in function.arg_names:
        if name in constants or name.startswith("BLOCK"):
            continue
        if name.endswith(("_NK", "_RK", "_NR", "_OR", "_NO", "_O")):
            signature[name] = element
        else:
            signature[name] = "*fp32" if name.endswith("_parts") else _SCALARS.get(name, "i32")
    on = " ".join(name for name, value in flags.items() if value)
    aligned = ("N", "K", "OUT", "R", "first_rank", "chunk", *(["rank_B"] if ranks > 16 else []))  # r = 8 is not
    label = f"{element[1:]} R={ranks} {on}".strip()
    return Build(function, candidate, number, signature, constants, label, tuple(n for n in aligned if n in signature))


def _sum_build(number: int) -> Build:
    sizes = "part_size", "width", "rows", "columns", "out_stride"
    integers = dict.fromkeys(("num_parts", *sizes), "i32")
    signature = {"parts": "*fp32", "out": "*bf16", **integers, "scale": "fp32"}
    return Build(triton_kernels.ordered_sum, block(4, 2, BLOCK=SUM_BLOCK), number, signature, {}, "bf16", sizes)


def _drop_build(number: int) -> Build:
    integers = dict.fromkeys(("N", "K", "threshold", "seed_low", "seed_high", "layer"), "i32")
    signature = {"x_NK": "*bf16", "out_NK": "*bf16", **_SCALARS, **integers}
    return Build(triton_kernels.drop, DROP_BLOCK, number, signature, {}, "bf16", ("N", "K"))
