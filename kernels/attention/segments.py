"""Where the segments of a batch begin: known on the host, so that no kernel waits for the device to say it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

# A group's segments are computed at the length of its longest. Shorter ones than this share of it begin a new group:
# at worst 1 - 0.75^2 = 44 % of a group's work is padding.
LEAST_FILL = 0.75


@dataclass(frozen=True)
class Group:
    """Segments of like lengths as one batch of N sequences of L tokens; a short one's last token is repeated."""

    rows: torch.Tensor  # [N * L] int64: which token each place holds
    repeated: torch.Tensor  # [P] int64: the places that hold a token again
    num_segments: int  # N
    length: int  # L


@dataclass(frozen=True)
class Segments:
    """The tokens of a batch, row by row, cut into segments: records, parts of them, and each row's padding.

    lengths: [n] tokens of each, on the host; their sum is B * S. A segment does not go beyond its row.
    cu_seqlens: [n + 1] int32, where each begins, and the end.
    """

    shape: tuple[int, int]  # (B, S)
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Segments":
        """From the lengths in each row, [B][...]. Raises ValueError where rows are not alike long, or a length is 0."""
        widths = {sum(row) for row in rows}
        lengths = tuple(int(length) for row in rows for length in row)
        if len(widths) != 1 or min(lengths) < 1:
            raise ValueError(f"segments of {sorted(widths)} tokens a row, the shortest of {min(lengths, default=0)}.")
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls((len(rows), widths.pop()), lengths, torch.from_numpy(starts).to(device))

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    def with_cu_seqlens(self, cu_seqlens: torch.Tensor) -> "Segments":
        """The same with its tensor elsewhere, such as on a device."""
        return replace(self, cu_seqlens=cu_seqlens)

    @cached_property
    def numbers(self) -> torch.Tensor:
        """[B, S] int64: which segment each token is of."""
        places = torch.arange(self.shape[0] * self.shape[1], device=self.cu_seqlens.device)
        return torch.bucketize(places, self.cu_seqlens[1:], right=True, out_int32=False).view(self.shape)

    @cached_property
    def groups(self) -> list[Group]:
        """All segments, longest first, in groups of like lengths."""
        lengths = np.array(self.lengths)
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(-lengths, kind="stable")
        groups, begin = [], 0
        while begin < len(order):
            longest = int(lengths[order[begin]])
            members = order[begin:][lengths[order[begin:]] >= LEAST_FILL * longest]
            place = np.arange(longest)[None]
            rows = starts[members][:, None] + np.minimum(place, lengths[members][:, None] - 1)
            repeated = np.flatnonzero(place >= lengths[members][:, None])
            groups.append(Group(self._there(rows.reshape(-1)), self._there(repeated), len(members), longest))
            begin += len(members)
        return groups

    @cached_property
    def places(self) -> torch.Tensor:
        """[B * S] int64: where each token is first, in the places of all groups one after another."""
        lengths = np.array(self.lengths)
        widths = np.concatenate([np.full(group.num_segments, group.length) for group in self.groups])
        first = np.empty(len(lengths), dtype=np.int64)  # of each segment, whose order in the groups is by length
        first[np.argsort(-lengths, kind="stable")] = np.cumsum(widths) - widths
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self._there(np.repeat(first, lengths) + within)

    def _there(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.cu_seqlens.device)
