"""The trace of torch.profiler (Chrome's format) as a tree of operations and a list of what the device did.

Microseconds, as in the file. On a GPU the device's work is kernels and copies, on a CPU the operations themselves.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tunesmith.train.profile.intervals import Intervals, Spans, union
from tunesmith.train.profile.ranges import PHASE, STEP
from tunesmith.train.ranks.phases import Phase

COMMUNICATION = ("nccl", "c10d::", "gloo:", "deepspeed_comm::")  # how names of collectives begin
PYTHON = ("autograd::", "torch::")  # how names of what only calls other operations begin
GPU_MEMORY, CPU_MEMORY = 1, 0  # torch's DeviceType


class Kind(StrEnum):
    compute = "compute"
    communication = "communication"
    copy = "copy"


@dataclass(slots=True, eq=False)
class Op:
    """An operation on the host: what it was called with, and what it was called by."""

    name: str
    start: float
    end: float
    thread: Any
    dims: list[Any]
    types: list[str]
    values: list[str]  # of arguments that are no tensor
    sequence: int | None = None  # autograd's: a forward and its backward have the same
    parent: "Op | None" = None
    frame: str = ""  # the innermost line of Python, where stacks were recorded
    own: float = 0.0  # without what it called

    def chain(self) -> Iterator[str]:
        """Its name, and those of all that it was called by."""
        op: Op | None = self
        while op is not None:
            yield op.name
            op = op.parent


@dataclass(slots=True, eq=False)
class Work:
    """Something that the device did."""

    name: str
    start: float
    end: float
    busy: float  # of its own: the work of a CPU's operation without that of those it calls
    kind: Kind
    phase: str  # in which the host asked for it
    op: Op | None = None


@dataclass
class Memory:
    moment: float
    num_bytes: int  # below 0: given back
    total: int  # allocated on the device after it
    address: int


@dataclass
class Trace:
    on_gpu: bool
    steps: Intervals = field(default_factory=list)
    phases: Spans = field(default_factory=lambda: Spans(()))
    ops: list[Op] = field(default_factory=list)
    calls: list[Op] = field(default_factory=list)  # of the CUDA runtime and driver
    works: list[Work] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    def in_steps(self, moment: float) -> bool:
        return any(start <= moment <= end for start, end in self.steps)


def read_trace(events: list[dict[str, Any]], *, on_gpu: bool, whole: bool = True) -> Trace:
    """traceEvents of a trace that was recorded with Ranges; what lies outside of its steps is left out.

    whole: also which operation a GPU's work belongs to, which break_down() does not ask.
    """
    trace = Trace(on_gpu)
    spans = [event for event in events if event.get("cat") == "user_annotation"]
    trace.steps = union(_ends(event) for event in spans if event["name"].startswith(STEP))
    trace.phases = Spans(
        (*_ends(event), event["name"].removeprefix(PHASE)) for event in spans if event["name"].startswith(PHASE)
    )
    wanted = ("cpu_op", "python_function") if whole or not on_gpu else ()
    host = [event for event in events if event.get("ph") == "X" and event.get("cat") in wanted]
    trace.ops = [op for op in _nested(host) if trace.in_steps(op.start)]
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver") and "dur" in event]
    trace.calls = [op for op in _within(calls, trace.ops) if trace.in_steps(op.start)]
    if on_gpu:
        trace.works = _gpu_works(events, trace)
    else:
        trace.works = _cpu_works(spans, trace)
    trace.memory = _memory(events, trace)
    return trace


def _ends(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event.get("dur", 0.0)


def _op(event: dict[str, Any]) -> Op:
    args = event.get("args", {})
    start, end = _ends(event)
    dims, types, values = (args.get(name, []) for name in ("Input Dims", "Input type", "Concrete Inputs"))
    return Op(
        event["name"], start, end, event.get("tid"), dims, types, values, args.get("Sequence number"), own=end - start
    )


def _nested(events: list[dict[str, Any]]) -> list[Op]:
    """Operations with their parents: on each thread, what began before and ends after."""
    found: list[Op] = []
    open_ops: dict[
        Any, list[tuple[Op | None, float, str]]
    ] = {}  # by thread: operation or none, its end, line of Python
    for event in sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0.0))):
        start, end = _ends(event)
        stack = open_ops.setdefault(event.get("tid"), [])
        while stack and stack[-1][1] <= start:
            stack.pop()
        parent, frame = (stack[-1][0], stack[-1][2]) if stack else (None, "")
        if event["cat"] == "python_function":
            stack.append((parent, end, event["name"] if _is_telling(event["name"]) else frame))
            continue
        op = _op(event)
        op.parent, op.frame = parent, frame
        if parent is not None:
            parent.own -= op.own
        stack.append((op, end, frame))
        found.append(op)
    return found


def _is_telling(frame: str) -> bool:
    """A line of a person's code: not of torch, not a built-in."""
    return ".py(" in frame and not frame.startswith(("torch/", "<", "contextlib"))


def _within(events: list[dict[str, Any]], ops: list[Op]) -> list[Op]:
    """Calls of the runtime, each with the operation of its thread that it was made in."""
    found = []
    by_thread: dict[Any, list[Op]] = {}
    for op in ops:  # in the order of their starts
        by_thread.setdefault(op.thread, []).append(op)
    starts = {thread: [op.start for op in of] for thread, of in by_thread.items()}
    for event in events:
        call = _op(event)
        before = bisect.bisect_right(starts.get(call.thread, []), call.start)
        parent = by_thread[call.thread][before - 1] if before else None
        while parent is not None and parent.end < call.start:
            parent = parent.parent
        call.parent, call.frame = parent, parent.frame if parent else ""
        found.append(call)
    return found


def _gpu_works(events: list[dict[str, Any]], trace: Trace) -> list[Work]:
    """Kernels and copies; each belongs to the phase and the operation in which the host launched it."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    by_place = {(call.thread, call.start): call.parent for call in trace.calls}
    works = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        start, end = _ends(event)
        launch = launches.get(event.get("args", {}).get("correlation"))
        asked = launch["ts"] if launch else start
        op = by_place.get((launch.get("tid"), asked)) if launch else None
        kind = Kind.compute if event["cat"] == "kernel" else Kind.copy
        if event["name"].startswith(COMMUNICATION):
            kind = Kind.communication
        if trace.in_steps(start):
            works.append(Work(event["name"], start, end, end - start, kind, trace.phases.name_at(asked), op))
    return works


def _cpu_works(spans: list[dict[str, Any]], trace: Trace) -> list[Work]:
    """Operations that compute. What only calls them, as a node of autograd does, is the host's own time."""
    works = []
    for op in trace.ops:
        phase = trace.phases.name_at(op.start)
        if "::" in op.name and not op.name.startswith(PYTHON) and phase != Phase.reading_data:
            kind = Kind.communication if op.name.startswith(COMMUNICATION) else Kind.compute
            works.append(Work(op.name, op.start, op.end, max(0.0, op.own), kind, phase, op))
    for event in spans:
        start, end = _ends(event)
        if event["name"].startswith(COMMUNICATION) and trace.in_steps(start):
            phase = trace.phases.name_at(start)
            works.append(Work(event["name"], start, end, end - start, Kind.communication, phase))
    return works


def _memory(events: list[dict[str, Any]], trace: Trace) -> list[Memory]:
    device = GPU_MEMORY if trace.on_gpu else CPU_MEMORY
    found = []
    for event in events:
        if event["name"] != "[memory]" or event["args"].get("Device Type") != device:
            continue
        args = event["args"]
        found.append(Memory(event["ts"], args["Bytes"], args["Total Allocated"], args["Addr"]))
    return sorted((row for row in found if trace.in_steps(row.moment)), key=lambda row: row.moment)
