"""The step as parts that add up to it, and which rank waits for which."""

from dataclasses import dataclass

from tunesmith.train.profile.intervals import Intervals, both, length, union, without
from tunesmith.train.profile.trace import Kind, Trace
from tunesmith.train.ranks.phases import Phase

PARTS = ("forward", "backward", "optimizer", "communication", "copies", "data wait", "idle")
BESIDE = {Kind.communication: "communication", Kind.copy: "copies"}
COMPUTE = {"forward": "forward", "backward": "backward"}  # by phase; the rest is the optimizer's


@dataclass(frozen=True)
class Breakdown:
    """Seconds of a step, on average over the recorded ones."""

    step: float
    parts: dict[str, float]  # of PARTS; they add up to the step
    communication: float  # in all, also beside other work
    overlapped: float  # of it, while the device computed
    idle_in: dict[str, float]  # the part "idle", by what the host was doing

    def share(self, part: str) -> float:
        return self.parts[part] / self.step if self.step else 0.0


def break_down(trace: Trace) -> Breakdown:
    """Every moment of a step belongs to the first that holds: computing, in the phase whose work it is; communicating;
    copying; waiting for data; idle.
    """
    window, count = trace.steps, 1e6 * max(1, len(trace.steps))
    gathered: dict[str, Intervals] = {part: [] for part in PARTS}
    for work in trace.works:
        part = BESIDE.get(work.kind) or COMPUTE.get(work.phase, "optimizer")
        gathered[part].append((work.start, work.end))
    layers = {part: union(intervals) for part, intervals in gathered.items()}
    layers["data wait"] = trace.phases.named(Phase.reading_data)
    layers["idle"] = window
    computing = union(part for name in ("forward", "backward", "optimizer") for part in layers[name])
    communicating = both(layers["communication"], window)
    parts, covered = {}, Intervals()
    for name in PARTS:
        fresh = without(both(layers[name], window), covered)
        parts[name] = length(fresh) / count
        covered = union([*covered, *fresh])
    return Breakdown(
        step=length(window) / count,
        parts=parts,
        communication=length(communicating) / count,
        overlapped=length(both(communicating, computing)) / count,
        idle_in={name: length(both(fresh, trace.phases.named(name))) / count for name in trace.phases.names},
    )


@dataclass(frozen=True)
class RankTimes:
    """One rank's step, in seconds. A collective ends for all at once: the rank that is least in them came last."""

    rank: int
    parts: dict[str, float]
    communication: float
    waits: float  # for the rank that the others wait for

    @property
    def busy(self) -> float:
        """Until it can meet the others: all but communication."""
        return sum(self.parts.values()) - self.parts["communication"]


def row_of(breakdown: Breakdown) -> list[float]:
    """What the other ranks need of it, for rank_times()."""
    return [*(breakdown.parts[name] for name in PARTS), breakdown.communication]


def rank_times(rows: list[list[float]]) -> list[RankTimes]:
    """Of row_of() of each rank."""
    parts = [dict(zip(PARTS, row[: len(PARTS)], strict=True)) for row in rows]
    least = min(each["communication"] for each in parts)
    return [
        RankTimes(rank, each, row[-1], each["communication"] - least)
        for rank, (each, row) in enumerate(zip(parts, rows, strict=True))
    ]


def waiting_words(ranks: list[RankTimes]) -> str:
    """Which rank waits for which, in a sentence; empty for one rank."""
    if len(ranks) < 2:
        return ""
    last, first = min(ranks, key=lambda rank: rank.waits), max(ranks, key=lambda rank: rank.waits)
    step = sum(first.parts.values())
    if not step or first.waits < 0.02 * step:
        return "No rank waits for another for 2 % of the step."
    more = {name: last.parts[name] - first.parts[name] for name in PARTS if name != "communication"}
    worst = max(more, key=lambda name: more[name])
    where = "the host's own time" if worst == "idle" else worst
    return (
        f"Rank {first.rank} waits {1000 * first.waits:.3g} ms of a step ({first.waits / step:.1%}) for rank "
        f"{last.rank}, which takes {1000 * more[worst]:.3g} ms longer in: {where}."
    )
