"""Axes with round numbers, and the frame of a picture that has two of them, as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tunesmith.train.track.report_data import nice_ticks, tick_labels

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 32
LOG_RATIO = 30.0  # values that differ more are drawn in the logarithm
SPREAD = 2.5  # times the distance from the best to the third quartile: what is worse is drawn at the edge
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1, with round numbers along it."""

    low: float
    high: float
    is_log: bool
    ticks: list[tuple[float, str]]

    def share(self, value: float) -> float:
        low, high, at = (math.log10(x) if self.is_log else x for x in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5


def worth_showing(values: Sequence[float], direction: str) -> list[float]:
    """The values without the few that are so bad that all others would lie on one line; those are drawn at the edge."""
    ordered = sorted(values, reverse=direction == "maximize")
    best, quartile = ordered[0], ordered[math.ceil(0.75 * len(ordered)) - 1]
    limit = best + SPREAD * (quartile - best)
    kept = [value for value in values if (value <= limit if direction == "minimize" else value >= limit)]
    return kept if quartile != best else list(values)


def axis(values: Sequence[float], *, is_log: bool | None = None, most: int = 5) -> Axis:
    """is_log: None decides by the values."""
    low, high = min(values), max(values)
    if is_log is None:
        is_log = low > 0 and high / low > LOG_RATIO
    if is_log and low > 0 and high > low:
        return _log_axis(low, high, most)
    ticks = nice_ticks(low, high, most)
    return Axis(ticks[0], ticks[-1], False, list(zip(ticks, tick_labels(ticks), strict=True)))


def _log_axis(low: float, high: float, most: int) -> Axis:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = max(1, math.ceil((last - first) / most))
    factors = (1.0,) if last - first > 1 else (1.0, 2.0, 5.0)
    marks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    span = math.log10(high / low) * 0.04
    low, high = low / 10**span, high * 10**span
    return Axis(low, high, True, [(mark, f"{mark:g}") for mark in marks if low <= mark <= high])


@dataclass(frozen=True)
class Frame:
    """A picture with two axes."""

    x_axis: Axis
    y_axis: Axis
    x_name: str

    def x(self, value: float) -> float:
        return LEFT + self.x_axis.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y_axis.share(value) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Points, classes: str, title: str = "") -> str:
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        return f'<path class="{classes}" d="M{path}">{titled(title)}</path>'

    def dot(self, x: float, y: float, classes: str, title: str, radius: float = 4.2) -> str:
        return (
            f'<circle class="{classes}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}">{titled(title)}</circle>'
        )

    def axes(self) -> str:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        rows = "".join(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{self.y(value) + 4:.1f}" text-anchor="end">{escape(label)}</text>'
            for value, label in self.y_axis.ticks
        )
        columns = "".join(
            f'<text x="{self.x(value):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(label)}</text>'
            for value, label in self.x_axis.ticks
        )
        name = f'<text x="{right}" y="{HEIGHT - 3}" text-anchor="end">{escape(self.x_name)}</text>'
        return f'{rows}<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>{columns}{name}'


def titled(text: str) -> str:
    """What shows where the pointer rests on a picture."""
    return f"<title>{escape(text)}</title>" if text else ""
