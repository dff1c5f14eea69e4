"""Block sizes of the Triton kernels: a static table for each kernel, and what a timed pick on this GPU has chosen.

A table maps an architecture (90 Hopper, 80 any other GPU, 0 the interpreter) to candidates, the first of which is the
default. compile_builds.py lists them all for the cross-compiler, so that none that spills is shipped.
"""

from dataclasses import dataclass

import torch

from tunesmith.kernels.device import arch


@dataclass(frozen=True)
class Block:
    """Tile sizes by the kernel's own names of its constexpr arguments, and how Triton schedules them."""

    sizes: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments for kernel[grid](...)."""
        return {**dict(self.sizes), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


def block(num_warps: int = 4, num_stages: int = 2, **sizes: int) -> Block:
    """block(8, 3, BLOCK_M=128, BLOCK_N=256)."""
    return Block(tuple(sizes.items()), num_warps, num_stages)


Table = dict[int, list[Block]]


def choose(kernel: str, table: Table, device: torch.device, shape: tuple[int, ...]) -> Block:
    """The block for a kernel at a shape: the timed pick if there is one, else the first candidate."""
    candidates = table[arch(device)]
    if asked is not None:
        asked[kernel, shape] = candidates
    return picked.get((kernel, shape)) or candidates[0]


# timed_pick.py fills these: which blocks were chosen by time, and while it looks, what is asked for.
Key = tuple[str, tuple[int, ...]]
picked: dict[Key, Block] = {}
asked: dict[Key, list[Block]] | None = None
