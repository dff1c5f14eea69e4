"""Silent corruption: every n steps, whether the weights that all ranks hold alike still are alike.

Each rank sums the bits of its weights, on its device. Weights that all ranks hold whole are compared over the ranks,
before the update overwrites them (under ZeRO 1 and 2 it would heal, or spread, what was flipped); frozen weights are
compared with their own sum at the start, which also a single rank can do and which ZeRO 3's shards allow as well. What
ZeRO 3 splits and trains exists once only: there is nothing to compare it with.
"""

from collections import Counter
from collections.abc import Iterable

import torch

from tunesmith.train.engine import Engine
from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.distributed import gather_floats
from tunesmith.train.zero.sharding import is_replicated, local_part

CHUNK = 1 << 24  # elements summed at a time: their int64 copies would else be as large as the model
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size
MAX_NAMED = 3  # tensors in the error


class Replicas:
    """The checksums of one engine's weights. Every rank makes one at the same time, once the weights are loaded."""

    def __init__(self, engine: Engine, hosts: list[str]) -> None:
        self._hosts = hosts
        self._device = engine.device
        parameters = list(engine.module.named_parameters())
        self.num_tensors = len(parameters)
        self._alike = {name: parameter for name, parameter in parameters if is_replicated(parameter)}
        parts = ((name, local_part(parameter)) for name, parameter in parameters if not parameter.requires_grad)
        self._frozen = {name: part for name, part in parts if part is not None}
        self.num_compared = len(self._alike | self._frozen)
        self._at_start = self._sums(self._frozen.values())

    def check(self, step: int) -> None:
        """Every rank calls it. Raises TrainingError, on all ranks, when some rank's weights are not what they were."""
        moved = self._sums(self._frozen.values()) - self._at_start
        mine = torch.cat([moved, self._sums(parameter.detach() for parameter in self._alike.values())])
        rows = gather_floats(mine[None]).tolist()
        frozen, alike = list(self._frozen), list(self._alike)
        changed = {
            rank: [name for name, moved in zip(frozen, row, strict=False) if moved] for rank, row in enumerate(rows)
        }
        wrong, surely = {rank: names for rank, names in changed.items() if names}, True
        if not wrong:
            wrong, surely = _odd_ones([row[len(frozen) :] for row in rows], alike)
        if wrong:
            raise self._error(wrong, surely, step)

    def _sums(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """A sum of the bits of each tensor, [n] int64, on the device; nothing waits for it."""
        sums = [bit_sum(tensor).to(self._device) for tensor in tensors]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=self._device)

    def _error(self, wrong: dict[int, list[str]], surely: bool, step: int) -> TrainingError:
        ranks = " and ".join(f"rank {rank} ({self._hosts[rank]})" for rank in wrong)
        names = list(dict.fromkeys(name for of_rank in wrong.values() for name in of_rank))
        more = f" and {len(names) - MAX_NAMED} more tensors" if len(names) > MAX_NAMED else ""
        tensors = f"{', '.join(names[:MAX_NAMED])}{more}"
        if surely:
            what = f"weights on {ranks} have changed in memory: {tensors}."
            do = "start again from the last checkpoint, without that machine until its memory is tested."
        else:
            what = f"the ranks no longer hold the same weights: {tensors} differ between {ranks}."
            do = "start again from the last checkpoint; which rank is wrong cannot be told, so test them all."
        return TrainingError(what, at=f"step {step}, cluster.check_replicas_every", do=do)


def _odd_ones(rows: list[list[int]], names: list[str]) -> tuple[dict[int, list[str]], bool]:
    """Ranks whose sums are not those of the most, with the tensors; and whether there was a majority everywhere."""
    odd: dict[int, list[str]] = {}
    surely = True
    for name, sums in zip(names, zip(*rows, strict=True), strict=True):
        (value, count), *others = [*Counter(sums).most_common(2), (0, 0)]
        if count == len(sums):
            continue
        tied = others[0][1] == count
        surely = surely and not tied
        for rank, own in enumerate(sums):
            if tied or own != value:
                odd.setdefault(rank, []).append(name)
    return odd, surely


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's elements read as integers, int64, chunk by chunk: any one flipped bit changes it.

    Each chunk's sum is mixed in by an odd factor, so that chunks that have changed places show.
    """
    bits = tensor.contiguous().view(-1).view(BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        total = total * 1_000_003 + bits[start : start + CHUNK].sum(dtype=torch.int64)
    return total
