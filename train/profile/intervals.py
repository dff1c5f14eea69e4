"""Sets of moments as sorted lists of intervals that do not overlap."""

import bisect
from collections.abc import Iterable

Intervals = list[tuple[float, float]]  # start and end, in microseconds


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Any intervals, put together."""
    joined: Intervals = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > start:
            joined.append((start, end))
    return joined


def both(left: Intervals, right: Intervals) -> Intervals:
    """What is in both of two unions."""
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            found.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(left: Intervals, right: Intervals) -> Intervals:
    """What is in the first of two unions and not in the second."""
    found, j = [], 0
    for start, end in left:
        while j < len(right) and right[j][1] <= start:
            j += 1
        k, at = j, start
        while k < len(right) and right[k][0] < end:
            if right[k][0] > at:
                found.append((at, right[k][0]))
            at = right[k][1]
            k += 1
        if at < end:
            found.append((at, end))
    return found


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


class Spans:
    """Named stretches of time, one after another."""

    def __init__(self, spans: Iterable[tuple[float, float, str]]) -> None:
        self._spans = sorted(spans)
        self._starts = [start for start, _, _ in self._spans]

    def index_at(self, moment: float) -> int | None:
        """The number of the stretch that a moment is in."""
        index = bisect.bisect_right(self._starts, moment) - 1
        return index if index >= 0 and moment <= self._spans[index][1] else None

    def name_at(self, moment: float) -> str:
        index = self.index_at(moment)
        return "" if index is None else self._spans[index][2]

    def named(self, name: str) -> Intervals:
        return union((start, end) for start, end, of in self._spans if of == name)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for _, _, name in self._spans))
