"""A trace as the figures of the page."""

from dataclasses import dataclass, replace

from tunesmith.train.profile.breakdown import Breakdown, RankTimes
from tunesmith.train.profile.categories import Category, category_of
from tunesmith.train.profile.ceilings import Ceilings
from tunesmith.train.profile.costs import Known, asked_for, cost
from tunesmith.train.profile.memory import Timeline, timeline
from tunesmith.train.profile.stalls import Stall, stalls
from tunesmith.train.profile.trace import Trace

NUM_TOP = 15


@dataclass
class Row:
    """Work of one category, or of one kernel: seconds, calls, FLOPs and bytes of a step."""

    name: str
    category: str
    seconds: float = 0.0
    count: float = 0.0
    flops: float = 0.0
    num_bytes: float = 0.0

    @property
    def flops_per_second(self) -> float | None:
        return self.flops / self.seconds if self.flops and self.seconds else None

    @property
    def bytes_per_second(self) -> float | None:
        return self.num_bytes / self.seconds if self.num_bytes and self.seconds else None

    def bound(self, ceilings: Ceilings) -> float:
        """Seconds that it would take at the ceilings."""
        return max(self.flops / ceilings.flops, self.num_bytes / ceilings.bytes_per_second)


@dataclass
class Analysis:
    """Of one rank's trace."""

    breakdown: Breakdown
    categories: list[Row]
    top: list[Row]
    stalls: list[Stall]
    memory: Timeline | None
    num_launches: float  # of the device's work, a step


@dataclass
class Profile:
    """What the page shows."""

    name: str
    steps: tuple[int, int]
    analysis: Analysis
    ceilings: Ceilings
    ranks: list[RankTimes]
    recording: float | None  # seconds that it has made a step longer; None where no other step was timed


def analyse(trace: Trace, breakdown: Breakdown, before: dict[str, int], known: Known | None = None) -> Analysis:
    """before: bytes on the device that outlive a step, by what they are for."""
    known = replace(known or Known(), adapted={op.sequence: op for op in trace.ops if op.name == "LoraLinear"})
    categories: dict[str, Row] = {name: Row(name, name) for name in Category}
    top: dict[tuple[str, str], Row] = {}
    counted: set[int] = set()
    for work in trace.works:
        category = category_of(work)
        op = asked_for(work)
        flops, num_bytes = (0.0, 0.0) if op is None or id(op) in counted else cost(op, work.name, known)
        if flops or num_bytes:
            counted.add(id(op))  # of several kernels of one operation, one has its cost
        row = top.setdefault((work.name, category), Row(work.name, category))
        for each in (categories[category], row):
            each.seconds += work.busy / 1e6
            each.count += 1
            each.flops += flops
            each.num_bytes += num_bytes
    steps = max(1, len(trace.steps))
    for row in (*categories.values(), *top.values()):
        row.seconds, row.count = row.seconds / steps, row.count / steps
        row.flops, row.num_bytes = row.flops / steps, row.num_bytes / steps
    return Analysis(
        breakdown,
        sorted((row for row in categories.values() if row.count), key=lambda row: -row.seconds),
        sorted(top.values(), key=lambda row: -row.seconds)[:NUM_TOP],
        stalls(trace),
        timeline(trace, before),
        len(trace.works) / steps,
    )
