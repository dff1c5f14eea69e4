"""What the device's memory holds at each moment of the recorded steps.

What was there before is known by name. What is allocated since is known by when: what the forward leaves for the
backward are activations; what the backward leaves for the update are gradients, and the buckets they travel in; what
ends in the phase it began in is a temporary.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from tunesmith.train.profile.trace import Trace
from tunesmith.train.ranks.phases import Phase

KINDS = ("parameters", "optimizer state", "gradients, buckets", "activations", "batches", "temporary", "other")
PARAMETERS, STATE, GRADIENTS, ACTIVATIONS, BATCHES, TEMPORARY, OTHER = KINDS
LEFT_BY: dict[str, str] = {
    Phase.reading_data: BATCHES,
    Phase.forward: ACTIVATIONS,
    Phase.backward: GRADIENTS,
    Phase.update: STATE,
}
MOST_POINTS = 400
NUM_LARGEST = 3


@dataclass(frozen=True)
class Timeline:
    moments: list[float]  # seconds since the first recorded step began
    held: dict[str, list[int]]  # bytes at each moment, by KINDS
    peak: dict[str, int]  # bytes of each kind when their sum is highest
    ends: list[float]  # of the steps
    largest: list[tuple[int, int, str]]  # at the peak: how many of how many bytes, allocated in which phase

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def timeline(trace: Trace, before: dict[str, int]) -> Timeline | None:
    """before: bytes that outlive a step, by kind. None where no memory was recorded."""
    if not trace.memory:
        return None
    changes, ends = _changes(trace)
    held = dict.fromkeys(KINDS, 0) | before
    first = trace.memory[0]
    if trace.on_gpu:  # a CPU's total counts from the start of the recording
        held[OTHER] += max(0, first.total - first.num_bytes - sum(held.values()))
    begin = trace.steps[0][0]
    moments, rows = [0.0], [dict(held)]
    for moment, kind, num_bytes in changes:
        held[kind] += num_bytes
        moments.append((moment - begin) / 1e6)
        rows.append(dict(held))
    totals = [sum(row.values()) for row in rows]
    highest, kept = max(range(len(rows)), key=totals.__getitem__), _thinned(totals)
    alike = Counter(
        (num_bytes, trace.phases.name_at(moment))
        for index, (moment, _, num_bytes) in enumerate(changes[:highest])
        if num_bytes > 0 and ends.get(index, highest) >= highest
    )
    largest = sorted(((count, *of) for of, count in alike.items()), key=lambda each: -each[0] * each[1])
    return Timeline(
        [moments[i] for i in kept],
        {kind: [rows[i][kind] for i in kept] for kind in KINDS},
        rows[highest],
        [(end - begin) / 1e6 for _, end in trace.steps],
        largest[:NUM_LARGEST],
    )


def _changes(trace: Trace) -> tuple[list[tuple[float, str, int]], dict[int, int]]:
    """Moment, kind and bytes of each change; and by the number of an allocation that of the change that ends it."""
    ends: dict[int, int] = {}
    changes: list[tuple[float, str, int]] = []
    opened: dict[int, list[tuple[int, int | None, str]]] = defaultdict(list)  # by address: change, phase, its name
    for row in trace.memory:
        phase = trace.phases.index_at(row.moment)
        if row.num_bytes > 0:
            name = trace.phases.name_at(row.moment)
            opened[row.address].append((len(changes), phase, name))
            changes.append((row.moment, LEFT_BY.get(name, TEMPORARY), row.num_bytes))
        elif opened[row.address]:
            index, began_in, name = opened[row.address].pop()
            moment, kind, num_bytes = changes[index]
            if began_in == phase:
                kind = TEMPORARY
                changes[index] = (moment, kind, num_bytes)
            ends[index] = len(changes)
            changes.append((row.moment, kind, -num_bytes))
    return changes, ends


def _thinned(totals: list[int]) -> list[int]:
    """Indices of at most MOST_POINTS rows: the highest of each stretch, and the last."""
    size = max(1, -(-len(totals) // MOST_POINTS))
    best = [max(range(i, min(i + size, len(totals))), key=totals.__getitem__) for i in range(0, len(totals), size)]
    return sorted({*best, 0, len(totals) - 1})
