"""Token ids on disk -> batches.

One split of the data is a folder of arrays. Examples lie in the order they are packed in, so a sequence is one slice:
    tokens.npy     [T] int32    ids of all examples, end to end
    weights.npy    [T] float32  of each token in the loss; 0: not learned, as the first token of every part
    records.npy    [R + 1] int64  where in the tokens each example starts
    parts.npy      [P] int64    where in the tokens each part starts; only where some example has several
    sequences.npy  [S + 1] int64  which example each sequence starts with
    columns/       [T] arrays of what else the objective knows of each token
    places.json    where each example came from
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson
import torch
from torch import Tensor

from tunesmith.kernels.attention.segments import Segments
from tunesmith.train.config.config import Packing
from tunesmith.train.data.example import Example
from tunesmith.train.data.packing import pack

IGNORE_INDEX = -100
WIDTH_MULTIPLE = 8  # unpacked batches are as wide as a multiple of this: tensor cores like it
PADDING_SEGMENT = 64  # tokens: padding sees itself in pieces of so many, which is cheap however much there is


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward. Padding is on the right, so a causal model needs no attention mask.

    inputs is what the model's forward gets by name: input_ids, [B, S] int64, and position_ids, [B, S] int64, from 0
    again at each part and at the padding where sequences are packed, else 0..S - 1. columns holds what the objective
    knows of each label, [B, S]: `weights`, float32, 0 where a label is ignored; and, where its examples have columns or
    parts, those by name and `example`, int64: the number of the example in the batch, -1 for padding. Tokens of other
    segments must not see each other.
    """

    inputs: dict[str, Tensor]
    labels: Tensor  # [B, S] int64: the next token of the same part, or IGNORE_INDEX
    columns: dict[str, Tensor]
    target_rows: Tensor  # [N] int64: flat indices b * S + s of the labels that count
    lengths: Tensor  # [B] int64: tokens of each sequence, before its padding
    segments: Segments
    num_examples: int  # as all counts, known without waiting for the device: what a loss may be divided by
    num_target_tokens: int  # labels that count
    target_weight: float  # sum of weights
    num_tokens: int  # tokens that are not padding

    @property
    def weights(self) -> Tensor:
        return self.columns["weights"]

    def targets(self) -> tuple[Tensor, Tensor]:
        """Labels and weights of the rows that count: [N] int64 and [N] float32, in the order of target_rows."""
        return self.labels.flatten()[self.target_rows], self.of_targets("weights")

    def of_targets(self, column: str) -> Tensor:
        """A column's values of the labels that count, [N], in the order of target_rows."""
        return self.columns[column].flatten()[self.target_rows]

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device; to a GPU from pinned memory, without waiting for the copy."""
        to_cuda = torch.device(device).type == "cuda"

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if to_cuda and tensor.device.type == "cpu" else tensor
            return pinned.to(device, non_blocking=to_cuda)

        return self._mapped(moved)

    def each(self, do: Callable[[Tensor], None]) -> None:
        """Calls a function with every tensor."""

        def done(tensor: Tensor) -> Tensor:
            do(tensor)
            return tensor

        self._mapped(done)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            labels=change(self.labels),
            columns={name: change(tensor) for name, tensor in self.columns.items()},
            target_rows=change(self.target_rows),
            lengths=change(self.lengths),
            segments=self.segments.with_cu_seqlens(change(self.segments.cu_seqlens)),
        )


class TokenStore:
    """One split: its examples' tokens, memory-mapped, and the sequences they are packed into."""

    def __init__(self, folder: Path, *, sequence_length: int, packing: Packing) -> None:
        self.folder = folder
        self.sequence_length = sequence_length
        self.is_packed = packing is Packing.best_fit
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.weights = np.load(folder / "weights.npy", mmap_mode="r")
        self.record_starts = np.load(folder / "records.npy")
        self.sequences = np.load(folder / "sequences.npy")
        self.columns = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("columns/*.npy"))}
        has_parts = (folder / "parts.npy").exists()
        self.part_starts = np.load(folder / "parts.npy") if has_parts else self.record_starts[:-1]
        self.is_isolated = self.is_packed or has_parts  # a sequence holds tokens that must not see each other
        self.sequence_starts = self.record_starts[self.sequences]  # [S + 1], in tokens
        self.lengths = np.diff(self.sequence_starts)  # [S], tokens of each sequence
        self.num_records = len(self.record_starts) - 1
        self.num_sequences = len(self.sequences) - 1
        self.num_tokens = len(self.tokens)
        self.num_target_tokens = int(np.count_nonzero(self.weights))
        self.max_length = int(np.diff(self.record_starts).max())  # tokens of the longest example
        self._tells_examples = has_parts or bool(self.columns)

    @property
    def fill(self) -> float:
        """Fraction of the positions of all sequences, each of sequence_length, that hold a token."""
        return self.num_tokens / (self.num_sequences * self.sequence_length)

    def places(self) -> list[str]:
        """Where each example came from, file.jsonl:12."""
        return orjson.loads((self.folder / "places.json").read_bytes())

    def record(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and weights of one example, [T] int32 and [T] float32."""
        start, end = self.record_starts[index], self.record_starts[index + 1]
        return self.tokens[start:end], self.weights[start:end]

    def batch(self, sequence_ids: Sequence[int], *, pad_token_id: int) -> Batch:
        """The tensors of some sequences; an id of -1 is an empty one: all padding, nothing learned.

        Packed sequences are sequence_length wide, others as wide as the longest, rounded up to a multiple of 8.
        """
        shape = (len(sequence_ids), self._width(sequence_ids))
        rows = [(row, self._slice(sequence_id)) for row, sequence_id in enumerate(sequence_ids) if sequence_id >= 0]
        input_ids = np.full(shape, pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        columns = {"weights": np.zeros(shape, dtype=np.float32)}
        columns |= {name: np.zeros(shape, dtype=column.dtype) for name, column in self.columns.items()}
        for row, tokens in rows:
            size = tokens.stop - tokens.start
            input_ids[row, :size] = self.tokens[tokens]
            # A position's label is the token after it. A part's first token weighs 0: no part predicts another's.
            label = slice(tokens.start + 1, tokens.stop)
            labels[row, : size - 1] = self.tokens[label]
            columns["weights"][row, : size - 1] = self.weights[label]
            for name, column in self.columns.items():
                columns[name][row, : size - 1] = column[label]
        weights = columns["weights"]
        labels[weights == 0] = IGNORE_INDEX
        if self._tells_examples:
            columns["example"] = self._example_numbers(sequence_ids, shape)
        target_rows = np.flatnonzero(weights)
        lengths = np.array([self.lengths[i] if i >= 0 else 0 for i in sequence_ids], dtype=np.int64)
        seen_together = [self._seen_together(i) if i >= 0 else np.array([], dtype=np.int64) for i in sequence_ids]
        return Batch(
            inputs={
                "input_ids": torch.from_numpy(input_ids),
                "position_ids": torch.from_numpy(self._positions(seen_together, shape)),
            },
            labels=torch.from_numpy(labels),
            columns={name: torch.from_numpy(column) for name, column in columns.items()},
            target_rows=torch.from_numpy(target_rows),
            lengths=torch.from_numpy(lengths),
            segments=Segments.of_rows([[*sizes, *_padding(shape[1] - sizes.sum())] for sizes in seen_together]),
            num_examples=sum(int(self.sequences[i + 1] - self.sequences[i]) for i in sequence_ids if i >= 0),
            num_target_tokens=len(target_rows),
            target_weight=float(weights.sum(dtype=np.float64)),
            num_tokens=int(lengths.sum()),
        )

    def places_of(self, sequence_ids: Sequence[int], places: list[str]) -> list[str]:
        """Where the examples of some sequences came from, given places()."""
        return [place for i in sequence_ids if i >= 0 for place in places[self.sequences[i] : self.sequences[i + 1]]]

    def _slice(self, sequence_id: int) -> slice:
        """A sequence's tokens."""
        return slice(int(self.sequence_starts[sequence_id]), int(self.sequence_starts[sequence_id + 1]))

    def _width(self, sequence_ids: Sequence[int]) -> int:
        if self.is_packed:
            return self.sequence_length
        longest = max((int(self.lengths[sequence_id]) for sequence_id in sequence_ids if sequence_id >= 0), default=1)
        return min(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.sequence_length)

    def _positions(self, seen_together: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        """[B, S] int64: from 0 again at each part and where the padding starts, if tokens must not see each other."""
        positions = np.tile(np.arange(shape[1]), (shape[0], 1))
        for row, sizes in enumerate(seen_together if self.is_isolated else []):
            with_padding = np.append(sizes, shape[1] - sizes.sum())
            positions[row] -= np.repeat(np.cumsum(with_padding) - with_padding, with_padding)
        return positions

    def _seen_together(self, sequence_id: int) -> np.ndarray:
        """Tokens of each part of a sequence, [n]; of all of it, where it holds none that must not see each other."""
        tokens = self._slice(sequence_id)
        if not self.is_isolated:
            return np.array([tokens.stop - tokens.start])
        first, last = np.searchsorted(self.part_starts, (tokens.start, tokens.stop))
        return np.diff(np.append(self.part_starts[first:last], tokens.stop))

    def _example_numbers(self, sequence_ids: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
        """[B, S] int64: which example of the batch each token is of; -1 for padding."""
        numbers, first = np.full(shape, -1, dtype=np.int64), 0
        for row, sequence_id in enumerate(sequence_ids):
            if sequence_id >= 0:
                begin, end = self.sequences[sequence_id], self.sequences[sequence_id + 1]
                sizes = np.diff(self.record_starts[begin : end + 1])
                numbers[row, : sizes.sum()] = np.repeat(np.arange(first, first + len(sizes)), sizes)
                first += len(sizes)
        return numbers


def _padding(num_tokens: int) -> list[int]:
    """The segments of so much padding."""
    whole, rest = divmod(int(num_tokens), PADDING_SEGMENT)
    return [PADDING_SEGMENT] * whole + ([rest] if rest else [])


def write_store(folder: Path, examples: list[Example], *, sequence_length: int, packing: Packing) -> None:
    """Pack examples, each of 2 to sequence_length tokens, and write them as a folder that TokenStore opens."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    bins = pack(lengths, sequence_length) if packing is Packing.best_fit else [[i] for i in range(len(examples))]
    ordered = [examples[index] for members in bins for index in members]
    record_starts = np.concatenate([[0], np.cumsum([len(example.input_ids) for example in ordered])])
    part_starts = np.concatenate(
        [start + np.array(example.part_starts) for start, example in zip(record_starts, ordered, strict=False)]
    )
    weights = np.concatenate([example.weights for example in ordered]).astype(np.float32)
    weights[part_starts] = 0  # nothing comes before a part's first token, so nothing predicts it
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", np.concatenate([example.input_ids for example in ordered]).astype(np.int32))
    np.save(folder / "weights.npy", weights)
    np.save(folder / "records.npy", record_starts)
    np.save(folder / "sequences.npy", np.concatenate([[0], np.cumsum([len(members) for members in bins])]))
    if len(part_starts) > len(ordered):
        np.save(folder / "parts.npy", part_starts)
    assert all(example.columns.keys() == ordered[0].columns.keys() for example in ordered), "examples of other columns"
    for name in ordered[0].columns:
        (folder / "columns").mkdir(exist_ok=True)
        np.save(folder / "columns" / f"{name}.npy", np.concatenate([example.columns[name] for example in ordered]))
    (folder / "places.json").write_bytes(orjson.dumps([example.place for example in ordered]))
