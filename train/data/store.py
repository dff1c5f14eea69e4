"""Token ids on disk -> micro batches.

One split of the data is a folder of arrays. Records lie in the order they are packed in, so a sequence is one slice:
    tokens.npy     [T] int32    ids of all records, end to end
    weights.npy    [T] float32  of each token in the loss; 0: not learned, as every record's first token
    records.npy    [R + 1] int64  where in the tokens each record starts
    sequences.npy  [S + 1] int64  which record each sequence starts with
    places.json    where each record came from
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from tunesmith.train.config.config import Packing
from tunesmith.train.data.packing import pack

IGNORE_INDEX = -100
WIDTH_MULTIPLE = 8  # unpacked micro batches are as wide as a multiple of this: tensor cores like it


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward. Padding is on the right, so a causal model needs no attention mask."""

    input_ids: Tensor  # [B, S] int64
    position_ids: Tensor  # [B, S] int64; packed: from 0 again at each record and at the padding; else 0..S - 1
    labels: Tensor  # [B, S] int64: the next token of the same record, or IGNORE_INDEX
    weights: Tensor  # [B, S] float32: of each label; 0 where it is ignored
    target_rows: Tensor  # [N] int64: flat indices b * S + s of the labels that count
    cu_seqlens: Tensor  # [n + 1] int32: where position_ids restart in the flattened [B * S] tokens, and B * S
    num_target_tokens: int  # labels that count
    target_weight: float  # sum of weights
    num_tokens: int  # tokens that are not padding

    def targets(self) -> tuple[Tensor, Tensor]:
        """Labels and weights of the rows that count: [N] int64 and [N] float32, in the order of target_rows."""
        return self.labels.flatten()[self.target_rows], self.weights.flatten()[self.target_rows]

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on a device; to a GPU from pinned memory, without waiting for the copy."""
        to_cuda = torch.device(device).type == "cuda"
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                pinned = value.pin_memory() if to_cuda and value.device.type == "cpu" else value
                values[name] = pinned.to(device, non_blocking=to_cuda)
        return MicroBatch(**values)


class TokenStore:
    """One split: its records' tokens, memory-mapped, and the sequences they are packed into."""

    def __init__(self, folder: Path, *, sequence_length: int, packing: Packing) -> None:
        self.folder = folder
        self.sequence_length = sequence_length
        self.is_packed = packing is Packing.best_fit
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.weights = np.load(folder / "weights.npy", mmap_mode="r")
        self.record_starts = np.load(folder / "records.npy")
        self.sequences = np.load(folder / "sequences.npy")
        self.sequence_starts = self.record_starts[self.sequences]  # [S + 1], in tokens
        self.lengths = np.diff(self.sequence_starts)  # [S], tokens of each sequence
        self.num_records = len(self.record_starts) - 1
        self.num_sequences = len(self.sequences) - 1
        self.num_tokens = len(self.tokens)
        self.num_target_tokens = int(np.count_nonzero(self.weights))
        self.max_length = int(np.diff(self.record_starts).max())  # tokens of the longest record

    @property
    def fill(self) -> float:
        """Fraction of the positions of all sequences, each of sequence_length, that hold a token."""
        return self.num_tokens / (self.num_sequences * self.sequence_length)

    def places(self) -> list[str]:
        """Where each record came from, file.jsonl:12."""
        return orjson.loads((self.folder / "places.json").read_bytes())

    def record(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and weights of one record, [T] int32 and [T] float32."""
        start, end = self.record_starts[index], self.record_starts[index + 1]
        return self.tokens[start:end], self.weights[start:end]

    def micro_batch(self, sequence_ids: Sequence[int], *, pad_token_id: int) -> MicroBatch:
        """The tensors of some sequences; an id of -1 is an empty one: all padding, nothing learned.

        Packed sequences are sequence_length wide, others as wide as the longest, rounded up to a multiple of 8.
        """
        width = self._width(sequence_ids)
        shape = (len(sequence_ids), width)
        input_ids = np.full(shape, pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        for row, sequence_id in enumerate(sequence_ids):
            if sequence_id < 0:
                continue
            start, end = self.sequence_starts[sequence_id], self.sequence_starts[sequence_id + 1]
            input_ids[row, : end - start] = self.tokens[start:end]
            # A position's label is the token after it. A record's first token weighs 0: no record predicts another's.
            weights[row, : end - start - 1] = self.weights[start + 1 : end]
            labels[row, : end - start - 1] = self.tokens[start + 1 : end]
        labels[weights == 0] = IGNORE_INDEX
        starts = self._starts(sequence_ids, width)
        positions = np.arange(labels.size) - np.repeat(starts[:-1], np.diff(starts))
        target_rows = np.flatnonzero(weights)
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(positions.reshape(shape)),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            target_rows=torch.from_numpy(target_rows),
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
            num_target_tokens=len(target_rows),
            target_weight=float(weights.sum(dtype=np.float64)),
            num_tokens=int(sum(self.lengths[sequence_id] for sequence_id in sequence_ids if sequence_id >= 0)),
        )

    def _width(self, sequence_ids: Sequence[int]) -> int:
        if self.is_packed:
            return self.sequence_length
        longest = max((int(self.lengths[sequence_id]) for sequence_id in sequence_ids if sequence_id >= 0), default=1)
        return min(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.sequence_length)

    def _starts(self, sequence_ids: Sequence[int], width: int) -> np.ndarray:
        """Flat positions at which position_ids restart, and the number of positions: [n + 1] int64."""
        if not self.is_packed:
            return np.arange(len(sequence_ids) + 1) * width
        starts = []
        for row, sequence_id in enumerate(sequence_ids):
            if sequence_id < 0:
                starts.append(np.array([row * width]))
                continue
            first, last = self.sequences[sequence_id], self.sequences[sequence_id + 1]
            ends = row * width + self.record_starts[first : last + 1] - self.record_starts[first]
            starts.append(ends if ends[-1] < (row + 1) * width else ends[:-1])  # the last one starts the padding
        return np.append(np.concatenate(starts), len(sequence_ids) * width)


def write_store(
    folder: Path,
    input_ids: list[np.ndarray],
    weights: list[np.ndarray],
    places: list[str],
    *,
    sequence_length: int,
    packing: Packing,
) -> None:
    """Pack records and write them as a folder that TokenStore opens.

    Args:
        input_ids: of each record, [T] int32, T from 2 to sequence_length.
        weights: of each token in the loss, [T] float32.
    """
    lengths = np.array([len(ids) for ids in input_ids], dtype=np.int64)
    if packing is Packing.best_fit:
        bins = pack(lengths, sequence_length)
    else:
        bins = [[index] for index in range(len(input_ids))]
    order = [index for members in bins for index in members]
    record_starts = np.concatenate([[0], np.cumsum(lengths[order])])
    all_weights = np.concatenate([weights[index] for index in order]).astype(np.float32)
    all_weights[record_starts[:-1]] = 0  # nothing comes before a record's first token, so nothing predicts it
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", np.concatenate([input_ids[index] for index in order]).astype(np.int32))
    np.save(folder / "weights.npy", all_weights)
    np.save(folder / "records.npy", record_starts)
    np.save(folder / "sequences.npy", np.concatenate([[0], np.cumsum([len(members) for members in bins])]))
    (folder / "places.json").write_bytes(orjson.dumps([places[index] for index in order]))
