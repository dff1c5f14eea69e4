"""The pictures of the page, as SVG without a script; a pointer at rest shows the figures."""

import math
from collections.abc import Sequence
from html import escape

from tunesmith.train.profile.analysis import Profile, Row
from tunesmith.train.profile.breakdown import PARTS, RankTimes
from tunesmith.train.profile.categories import Category
from tunesmith.train.profile.memory import KINDS, Timeline

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 34

CATEGORIES = tuple(Category)
Value = tuple[str, float, str, str]  # name, size, CSS class of its colour, what is said of it


def color(names: Sequence[str], name: str) -> str:
    return f"c{names.index(name)}"


def bar(values: list[Value], whole: float) -> str:
    """One bar of parts, side by side."""
    at, pieces = 0.0, []
    for name, size, css, words in values:
        width = 100 * size / whole if whole else 0.0
        if width > 0:
            text = f'<text x="{at + width / 2:.2f}%" y="21" text-anchor="middle">{escape(name)}</text>'
            pieces.append(
                f'<g><title>{escape(words)}</title><rect class="{css}" x="{at:.2f}%" width="{width:.2f}%" height="32"/>'
                f"{text if width > 1.3 * len(name) else ''}</g>"
            )
        at += width
    return f'<svg class="bar" height="32" role="img" aria-label="parts of the step">{"".join(pieces)}</svg>'


def legend(names: Sequence[str], shown: Sequence[str]) -> str:
    return "".join(f'<span class="dot {color(names, name)}">{escape(name)}</span>' for name in names if name in shown)


def step_bar(profile: Profile) -> str:
    breakdown = profile.analysis.breakdown
    values = [
        (part, seconds, color(PARTS, part), f"{part}: {milli(seconds)}, {breakdown.share(part):.1%}")
        for part, seconds in breakdown.parts.items()
    ]
    return bar(values, breakdown.step)


def ranks_bars(ranks: list[RankTimes]) -> str:
    longest = max(sum(rank.parts.values()) for rank in ranks)
    rows = []
    for rank in ranks:
        words = {part: f"rank {rank.rank}, {part}: {milli(seconds)}" for part, seconds in rank.parts.items()}
        values = [("", seconds, color(PARTS, part), words[part]) for part, seconds in rank.parts.items()]
        rows.append(
            f"<tr><td>rank {rank.rank}</td><td class=wide>{bar(values, longest)}</td><td>{milli(rank.busy)}</td>"
            f"<td>{milli(rank.communication)}</td><td>{milli(rank.waits)}</td></tr>"
        )
    return "".join(rows)


def roofline(profile: Profile) -> str:
    """FLOP/s against FLOPs a byte, both in powers of ten: the roof is what the device can do."""
    ceilings = profile.ceilings
    points = [row for row in profile.analysis.categories if row.flops and row.num_bytes and row.seconds]
    if not points:
        return ""
    knee = ceilings.flops / ceilings.bytes_per_second
    across = [row.flops / row.num_bytes for row in points]
    up = [row.flops / row.seconds for row in points]
    x = Log(min([*across, knee / 3]), max([*across, knee * 10]), LEFT, WIDTH - RIGHT)
    y = Log(min(up), ceilings.flops * 1.6, HEIGHT - BOTTOM, TOP)
    roof = [(x.low, x.low * ceilings.bytes_per_second), (knee, ceilings.flops), (x.high, ceilings.flops)]
    start = max(x.low, y.low / ceilings.bytes_per_second)
    roof[0] = (start, start * ceilings.bytes_per_second)
    line = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in roof)
    step = profile.analysis.breakdown.step
    dots = "".join(
        f"<g><title>{escape(row.name)}: {rate(row.flops_per_second, 'FLOP/s')}, {a:.3g} FLOPs a byte</title>"
        f'<circle class="{color(CATEGORIES, row.name)}" cx="{x(a):.1f}" cy="{y(b):.1f}" '
        f'r="{4 + 10 * math.sqrt(row.seconds / step):.1f}"/></g>'
        for row, a, b in zip(points, across, up, strict=True)
    )
    return svg(f'{x.axis("FLOPs a byte")}{y.rows("FLOP/s")}<path class="roof" d="M{line}"/>{dots}', "roofline")


def memory_chart(memory: Timeline) -> str:
    """What is held, one kind upon the other."""
    last, top = memory.moments[-1] or 1.0, max(map(sum, zip(*memory.held.values(), strict=True))) or 1
    unit = 2**30 if top >= 2**30 else 2**20

    def x(moment: float) -> float:
        return LEFT + moment / last * (WIDTH - LEFT - RIGHT)

    def y(num_bytes: float) -> float:
        return HEIGHT - BOTTOM - num_bytes / (1.08 * top) * (HEIGHT - TOP - BOTTOM)

    below, areas = [0] * len(memory.moments), ""
    for index, kind in enumerate(KINDS):
        above = [a + b for a, b in zip(below, memory.held[kind], strict=True)]
        if any(memory.held[kind]):
            edge = [f"{x(t):.1f} {y(b):.1f}" for t, b in stairs(memory.moments, above)]
            back = [f"{x(t):.1f} {y(b):.1f}" for t, b in reversed(stairs(memory.moments, below))]
            areas += (
                f'<path class="area c{index}" d="M{"L".join([*edge, *back])}Z"><title>{kind}: at the peak '
                f"{size(memory.peak[kind])}</title></path>"
            )
        below = above
    ticks = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(part * top):.1f}" y2="{y(part * top):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(part * top) + 4:.1f}" text-anchor="end">{part * top / unit:.3g}</text>'
        for part in (0, 0.25, 0.5, 0.75, 1)
    )
    ends = "".join(
        f'<line class="cut" x1="{x(end):.1f}" x2="{x(end):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        for end in memory.ends[:-1]
        if end < last
    )
    foot = f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 12}" text-anchor="end">{last:.3g} s</text>'
    head = f'<text x="{LEFT}" y="{HEIGHT - 12}">{"GiB" if unit == 2**30 else "MiB"}, dashes between steps</text>'
    return svg(f"{ticks}{areas}{ends}{head}{foot}", "memory over the recorded steps")


def stairs(moments: list[float], values: list[int]) -> list[tuple[float, int]]:
    """Values that hold until the next moment."""
    points = [(moments[0], values[0])]
    for moment, before, now in zip(moments[1:], values[:-1], values[1:], strict=True):
        points += [(moment, before), (moment, now)]
    return points


def svg(body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'


class Log:
    """A logarithmic axis over whole powers of ten."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.first, self.last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        self.low, self.high = 10.0**self.first, 10.0**self.last
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.first) / max(1, self.last - self.first)
        return self._start + share * (self._end - self._start)

    @property
    def _ticks(self) -> list[float]:
        every = max(1, (self.last - self.first) // 5)
        return [10.0**power for power in range(self.first, self.last + 1, every)]

    def axis(self, title: str) -> str:
        ticks = "".join(
            f'<line class="grid" x1="{self(tick):.1f}" x2="{self(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{self(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>'
            for tick in self._ticks
        )
        return f'{ticks}<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{title}</text>'

    def rows(self, title: str) -> str:
        ticks = "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self(tick):.1f}" y2="{self(tick):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{self(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>'
            for tick in self._ticks
        )
        return f'{ticks}<text x="{LEFT + 6}" y="{TOP + 10}">{title}</text>'


UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def short(value: float) -> str:
    """12.3 G"""
    factor, unit = next(((factor, unit) for factor, unit in UNITS if value >= 0.9995 * factor), (1, ""))
    return f"{value / factor:.3g} {unit}".strip()


def rate(value: float | None, unit: str) -> str:
    """12.3 GFLOP/s, or a dash."""
    if not value:
        return "–"
    number, _, prefix = short(value).partition(" ")
    return f"{number} {prefix}{unit}"


def milli(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def size(num_bytes: float) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if num_bytes >= u), (2**10, "KiB"))
    return f"{num_bytes / unit:.3g} {name}" if num_bytes else "0"


def share_of(row: Row, profile: Profile) -> str:
    """How near it comes to the ceiling that holds it back."""
    bound = row.bound(profile.ceilings)
    if not bound or not row.seconds:
        return "–"
    return f"{bound / row.seconds:.0%}" if bound <= row.seconds else "above it"
