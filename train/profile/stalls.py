"""Where the host waits for the device, or would on a GPU."""

from collections import defaultdict
from dataclasses import dataclass

from tunesmith.train.profile.trace import Op, Trace

# They need a number of the device's to go on. On a CPU it is there at once; on a GPU each is a wait.
SYNCING = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select"})
WAITING = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"})


@dataclass(frozen=True)
class Stall:
    what: str
    phase: str
    where: str  # the line of code where stacks were recorded, else the operation it was called by
    count: float  # a step
    seconds: float  # a step


def stalls(trace: Trace) -> list[Stall]:
    """The costliest first."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    waits = [op for op in trace.ops if op.name in SYNCING]
    if trace.on_gpu:
        waits = [call for call in trace.calls if call.name in WAITING]
    for op in waits:
        found[op.name, trace.phases.name_at(op.start), op.frame or _outermost(op)].append(op.end - op.start)
    count = max(1, len(trace.steps))
    rows = [Stall(*place, len(times) / count, sum(times) / 1e6 / count) for place, times in found.items()]
    return sorted(rows, key=lambda row: (row.seconds, row.count), reverse=True)


def _outermost(op: Op) -> str:
    """The operation that was called from Python, such as aten::item."""
    return list(op.chain())[-1]
