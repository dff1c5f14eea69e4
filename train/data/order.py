"""The order of training: which sequences make up each global batch, and which rank gets which of them."""

import math
from fractions import Fraction

import numpy as np

from tunesmith.train.ranks.distributed import World

EMPTY_SEQUENCE = -1
MEGABATCH = 50  # global batches whose sequences are sorted by length together, as in transformers' LengthGroupedSampler


class GlobalOrder:
    """The stream of sequences over all epochs, cut into global batches.

    It depends on nothing but its arguments: not on the number of ranks, nor on how a global batch is cut into micro
    batches. Any step can be asked for directly, so resuming needs the step number alone. One epoch runs on into the
    next within a global batch; each epoch holds every sequence once.
    """

    def __init__(
        self,
        num_sequences: int,
        *,
        global_batch_size: int,
        seed: int,
        lengths: np.ndarray | None = None,
        shuffle: bool = True,
    ) -> None:
        """lengths: tokens of each sequence, [num_sequences], for batches of like lengths (unpacked sequences)."""
        if num_sequences < 1 or global_batch_size < 1:
            raise ValueError(
                f"num_sequences={num_sequences} and global_batch_size={global_batch_size} must be above 0."
            )
        if lengths is not None and len(lengths) != num_sequences:
            raise ValueError(f"{len(lengths)} lengths for {num_sequences} sequences.")
        self.num_sequences = num_sequences
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.lengths = lengths
        self.shuffle = shuffle
        self._epochs: dict[int, np.ndarray] = {}  # the orders of the epochs last used

    def num_samples(self, epochs: float) -> int:
        """Sequences in that many passes, rounded up."""
        return math.ceil(Fraction(str(epochs)) * self.num_sequences)  # str: 0.1 means one tenth, not the float above it

    def steps_for(self, epochs: float) -> int:
        """Global batches in that many passes, the last one perhaps not full."""
        return -(-self.num_samples(epochs) // self.global_batch_size)

    def epoch_at(self, step: int) -> float:
        """Passes done before a step."""
        return step * self.global_batch_size / self.num_sequences

    def global_batch(self, step: int, num_samples_total: int | None = None) -> list[int]:
        """The sequence ids of a step (counted from 0): global_batch_size of them, -1 beyond the run's last sample."""
        first = step * self.global_batch_size
        samples = range(first, first + self.global_batch_size)
        return [
            EMPTY_SEQUENCE if num_samples_total is not None and sample >= num_samples_total else self._at(sample)
            for sample in samples
        ]

    def _at(self, sample: int) -> int:
        epoch, position = divmod(sample, self.num_sequences)
        if epoch not in self._epochs:
            self._epochs = {key: order for key, order in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = self._epoch(epoch)
        return int(self._epochs[epoch][position])

    def _epoch(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.num_sequences) if self.shuffle else np.arange(self.num_sequences)
        if self.lengths is None or not self.shuffle:
            return order
        return self._group_by_length(order, self.lengths, random, epoch)

    def _group_by_length(
        self, order: np.ndarray, lengths: np.ndarray, random: np.random.Generator, epoch: int
    ) -> np.ndarray:
        """Like lengths side by side within a megabatch, the global batches then shuffled.

        The epoch's first sequences complete the global batch that the epoch before left open; they and the last ones,
        which are completed by the next epoch, stay where they are.
        """
        size = self.global_batch_size
        head = min(-epoch * self.num_sequences % size, self.num_sequences)
        num_full = (self.num_sequences - head) // size
        body, tail = order[head : head + num_full * size], order[head + num_full * size :]
        megabatches = [body[i : i + MEGABATCH * size] for i in range(0, len(body), MEGABATCH * size)]
        ordered = [part[np.argsort(-lengths[part], kind="stable")].reshape(-1, size) for part in megabatches]
        batches = np.concatenate(ordered) if ordered else body.reshape(-1, size)
        return np.concatenate([order[:head], batches[random.permutation(num_full)].reshape(-1), tail])


def split_global_batch(
    ids: list[int], lengths: np.ndarray | None, *, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """This rank's micro batches of a global batch; over all ranks they are the global batch, each id once.

    Args:
        lengths: tokens of each sequence, for unpacked sequences: micro batches then hold like lengths, the longest
            first, and ranks that run at the same time get neighbouring ones. None: the order stays.
    Raises: ValueError when the global batch does not divide into micro batches over the ranks.
    """
    if len(ids) % (micro_batch_size * world_size):
        raise ValueError(f"{len(ids)} sequences don't divide into {micro_batch_size} x {world_size} ranks.")
    if lengths is not None:
        ids = sorted(ids, key=lambda id_: (-int(lengths[id_]) if id_ >= 0 else 0, id_))
    micro_batches = [ids[i : i + micro_batch_size] for i in range(0, len(ids), micro_batch_size)]
    return micro_batches[rank::world_size]


def rank_batches(num_items: int, batch_size: int, world: World) -> list[list[int]]:
    """This rank's batches of item numbers, as many as on every other rank; -1 stands for no item."""
    stride = batch_size * world.world_size
    batches = []
    for start in range(0, num_items, stride):
        first = start + world.rank * batch_size
        batches.append([i if i < num_items else -1 for i in range(first, first + batch_size)])
    return batches
