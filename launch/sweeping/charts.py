"""The pictures of sweep.html, as SVG that needs nothing else. Titles show the figures where the pointer rests."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from tunesmith.launch.sweeping.axes import BOTTOM, HEIGHT, TOP, WIDTH, Axis, Frame, axis, titled, worth_showing
from tunesmith.launch.sweeping.result import SweepResult, TrialRow
from tunesmith.train.track.console import figure, spoken
from tunesmith.train.track.report_data import words


def history(result: SweepResult) -> str:
    """The first metric of each trial in the order of their beginning, and the best until then."""
    done, last = result.done, len(result.rows) - 1
    if not done:
        return ""
    better: Callable[[float, float], float] = min if result.direction == "minimize" else max
    best = list(itertools.accumulate((row.value for row in done), better))
    steps = [(done[0].number, best[0])]
    for row, before, now in zip(done[1:], best, best[1:], strict=False):
        steps += [(row.number, before), (row.number, now)]
    every = max(1, math.ceil((last + 1) / 10))
    counting = Axis(-0.5, last + 0.5, False, [(float(number), str(number)) for number in range(0, last + 1, every)])
    frame = Frame(counting, _shown_values(result), "trial")
    others = "".join(
        f'<text class="bad-mark" x="{frame.x(row.number):.1f}" y="{HEIGHT - BOTTOM - 4}" text-anchor="middle">'
        f"{'×' if row.status == 'failed' else '–'}{titled(_title(result, row))}</text>"
        for row in result.rows
        if row.status in ("failed", "pruned")
    )
    line = frame.line([*steps, (last, best[-1])], "l1 faint")
    body = frame.axes() + line + _dots(result, frame, lambda row: (row.number, row.value)) + others
    return _figure(f"{_metric(result.metric)} of each trial", body, "line: best so far;  × failed;  – stopped early")


def curves(result: SweepResult) -> str:
    """The learning curve of every trial, the best ones on top."""
    drawn = [row for row in result.rows if row.curve]
    if not drawn:
        return ""
    values = [value for row in drawn for _, value in row.curve]
    last = max(step for row in drawn for step, _ in row.curve)
    frame = Frame(axis([0.0, float(last)], is_log=False), axis(worth_showing(values, "minimize")), "steps")
    body = frame.axes()
    for row in sorted(drawn, key=lambda row: row.number in result.best):
        is_best, title = row.number in result.best, _title(result, row)
        if len(row.curve) == 1:
            body += frame.dot(*row.curve[0], "d1" if is_best else "d0", title, 3.4)
        else:
            body += frame.line(row.curve, "l1" if is_best else "l0 thin" if row.values else "ls thin", title)
    return _figure(f"{_metric(result.curve_metric)} by step", body, "strong: the best;  dashed: did not finish")


def parallel(result: SweepResult) -> str:
    """A line for each finished trial through its parameters and metrics; the better the first metric the stronger."""
    rows, keys = result.done, _varied(result)
    if len(rows) < 2 or not keys:
        return ""
    columns = [_column(result, key) for key in keys]
    columns += [_metric_column(rows, index, *pair) for index, pair in enumerate(result.metrics.items())]
    width, height = max(1000, 180 * len(columns)), 300
    left, right, top, bottom = 20, 90, 34, 20
    xs = [left + index * (width - left - right) / (len(columns) - 1) for index in range(len(columns))]

    def y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    body = ""
    ranked = sorted(rows, key=lambda row: row.value, reverse=result.direction == "minimize")  # the best on top
    for rank, row in enumerate(ranked):
        path = "L".join(f"{x:.1f} {y(column.shares[row.number]):.1f}" for x, column in zip(xs, columns, strict=True))
        strength = 0.12 + 0.88 * ((rank + 1) / len(ranked)) ** 3
        kind, title = "l1" if row.number in result.best else "l0", titled(_title(result, row))
        body += f'<path class="{kind}" style="opacity:{strength:.2f}" d="M{path}">{title}</path>'
    for x, column in zip(xs, columns, strict=True):
        body += f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
        anchor = "start" if x < 60 else "end" if x > width - right + 40 else "middle"
        body += f'<text class="name" x="{x:.1f}" y="16" text-anchor="{anchor}">{escape(column.name)}</text>'
        body += "".join(
            f'<text x="{x + 6:.1f}" y="{y(share) + 4:.1f}">{escape(label)}</text>' for share, label in column.labels
        )
    return _figure("Parameters and what came of them", body, "orange: the best", width, height, "wide")


def importances(result: SweepResult) -> str:
    """How much each parameter matters for the first metric."""
    if not result.importances:
        return ""
    body, step = "", 34
    for index, (key, share) in enumerate(sorted(result.importances.items(), key=lambda item: -item[1])):
        y, width = TOP + index * step, max(2.0, share * (WIDTH - 260))
        body += (
            f'<text class="name" x="190" y="{y + 18}" text-anchor="end">{escape(_short(key))}{titled(key)}</text>'
            f'<rect class="bar" x="200" y="{y + 4}" width="{width:.1f}" height="20" rx="3"/>'
            f'<text x="{208 + width:.1f}" y="{y + 18}">{share:.0%}</text>'
        )
    note, height = f"share in the {_metric(result.metric)} (PED-ANOVA)", TOP + step * len(result.importances) + 12
    return _figure("What matters", body, note, WIDTH, height)


def slices(result: SweepResult) -> list[str]:
    """For each parameter: the first metric over its values."""
    return [_slice(result, key) for key in _varied(result)]


def _slice(result: SweepResult, key: str) -> str:
    column = _column(result, key)
    frame = Frame(Axis(-0.04, 1.04, False, column.labels), _shown_values(result), key.lstrip("+"))
    dots = _dots(result, frame, lambda row: (column.shares[row.number], row.value))
    return _figure(f"{_metric(result.metric)} over {_short(key)}", frame.axes() + dots, "")


def pareto(result: SweepResult) -> str:
    """The first two metrics against each other; the trials that no other beats are joined."""
    if len(result.metrics) < 2 or not result.done:
        return ""
    pairs = {row.number: (row.value, row.values[1]) for row in result.done if row.values}
    x_axis, y_axis = (
        axis(worth_showing(values, way))
        for values, way in zip(zip(*pairs.values(), strict=True), result.metrics.values(), strict=False)
    )
    x_name, y_name = (_metric(name) for name in list(result.metrics)[:2])
    frame = Frame(x_axis, y_axis, x_name)
    front = sorted(pairs[number] for number in result.best if number in pairs)
    line = frame.line(front, "l1 faint") if len(front) > 1 else ""
    body = frame.axes() + line + _dots(result, frame, lambda row: pairs[row.number])
    return _figure(f"{y_name} against {x_name}", body, "orange: the Pareto set")


@dataclass(frozen=True)
class Column:
    """One axis of the parallel coordinates: where each trial is on it, from 0 to 1."""

    name: str
    shares: dict[int, float]
    labels: list[tuple[float, str]]


def _column(result: SweepResult, key: str) -> Column:
    params = {row.number: row.params.get(key) for row in result.done}
    numbers = {number: value for number, value in params.items() if isinstance(value, float | int)}
    if len(numbers) == len(params):
        return _on_axis(_short(key), numbers, axis(list(numbers.values()), is_log=key in result.log_keys))
    texts = {number: _shown(value) for number, value in params.items()}
    order = sorted(set(texts.values()), key=lambda text: (_number(text) is None, _number(text) or 0.0, text))
    shares = {text: (index + 0.5) / len(order) for index, text in enumerate(order)}
    labels = [(share, text if len(text) <= 18 else f"{text[:17]}…") for text, share in shares.items()]
    return Column(_short(key), {number: shares[text] for number, text in texts.items()}, labels)


def _metric_column(rows: list[TrialRow], index: int, name: str, direction: str) -> Column:
    values = {row.number: row.values[index] for row in rows if row.values}
    return _on_axis(_metric(name), values, axis(worth_showing(list(values.values()), direction)))


def _on_axis(name: str, values: dict[int, float], scale: Axis) -> Column:
    labels = [(scale.share(value), label) for value, label in scale.ticks]
    return Column(name, {number: scale.share(value) for number, value in values.items()}, labels)


def _dots(result: SweepResult, frame: Frame, place: Callable[[TrialRow], tuple[float, float]]) -> str:
    kinds = {row.number: "d1" if row.number in result.best else "d0" for row in result.done}
    return "".join(frame.dot(*place(row), kinds[row.number], _title(result, row)) for row in result.done)


def _shown_values(result: SweepResult) -> Axis:
    return axis(worth_showing([row.value for row in result.done], result.direction))


def _varied(result: SweepResult) -> list[str]:
    """The parameters that differ between finished trials."""
    return [key for key in result.keys if len({_shown(row.params.get(key)) for row in result.done}) > 1]


def _title(result: SweepResult, row: TrialRow) -> str:
    params = ", ".join(f"{_short(key)} {_shown(value)}" for key, value in row.params.items())
    pairs = zip(result.metrics, row.values or [], strict=False)
    values = ", ".join(f"{_metric(name)} {figure(name, value)}" for name, value in pairs)
    return f"trial {row.number} ({row.status}): {params}" + (f"; {values}" if values else "")


def _metric(name: str) -> str:
    return words({"eval/loss": "eval_loss", "train/loss": "train_loss"}.get(name, name.rsplit("/", 1)[-1]))


def _short(key: str) -> str:
    return spoken(key.lstrip("+").rsplit(".", 1)[-1])


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _figure(title: str, body: str, note: str, width: int = WIDTH, height: int = HEIGHT, kind: str = "") -> str:
    return (
        f'<figure class="card chart {kind}"><figcaption><h3>{escape(title[:1].upper() + title[1:])}</h3>'
        f"<span>{escape(note)}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )
