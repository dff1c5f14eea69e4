"""Block sizes of the Triton kernels: a static table for each kernel, and what a timed pick on this GPU has chosen.

A table maps an architecture (90 Hopper, 80 any other GPU, 0 the interpreter) to candidates, the first of which is the
default. compile_builds.py launches them all for the cross-compiler, so that none that spills is shipped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
ALIGNMENT = 16  # elements of a size, bytes of an address: Triton reads vectors where it knows of multiples of it


def even(*numbers: int | torch.Tensor) -> bool:
    """Whether sizes, and the addresses of tensors, are such that Triton reads vectors; else tables are for odd ones."""
    return all((n.data_ptr() if isinstance(n, torch.Tensor) else n) % ALIGNMENT == 0 for n in numbers)


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


@contextmanager
def trying(trial: dict[Key, Block], asked_for: dict[Key, list[Block]]) -> Iterator[None]:
    """Inside, kernels use a trial, and what they ask for is noted."""
    global asked
    before = dict(picked)
    picked.update(trial)
    asked = asked_for
    try:
        yield
    finally:
        asked = None
        picked.clear()
        picked.update(before)
