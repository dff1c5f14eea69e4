"""The pictures of sweep.html, as SVG that needs nothing else. Titles show the figures where the pointer rests."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from tunesmith.launch.sweeping.axes import BOTTOM, HEIGHT, TOP, WIDTH, Axis, Frame, axis, titled, worth_showing
from tunesmith.launch.sweeping.result import Result, Row
from tunesmith.train.track.console import figure, spoken
from tunesmith.train.track.report_data import words


def history(result: Result) -> str:
    """The first metric of each trial in the order of their beginning, and the best until then."""
    done = [(row, row.values[0]) for row in result.rows if row.values]
    if not done:
        return ""
    metric, better = result.metrics[0], _better(result)
    best = [done[0][1]]
    for _, value in done[1:]:
        best.append(better(best[-1], value))
    shown = worth_showing([value for _, value in done], result.directions[0])
    frame = Frame(_counting([row.number for row in result.rows]), axis(shown), "trial")
    steps: list[tuple[float, float]] = []
    for (row, _), value in zip(done, best, strict=True):
        steps += ([(row.number, steps[-1][1])] if steps else []) + [(row.number, value)]
    steps.append((result.rows[-1].number, best[-1]))
    dots = "".join(
        frame.dot(row.number, value, "d1" if row.number in result.best else "d0", _trial_title(result, row))
        for row, value in done
    )
    others = "".join(
        f'<text class="bad-mark" x="{frame.x(row.number):.1f}" y="{HEIGHT - BOTTOM - 4}" text-anchor="middle">'
        f"{'×' if row.status == 'failed' else '–'}{titled(_trial_title(result, row))}</text>"
        for row in result.rows
        if row.status in ("failed", "pruned")
    )
    body = frame.axes() + frame.line(steps, "l1 faint") + dots + others
    return _figure(f"{_metric(metric)} of each trial", body, "line: best so far;  × failed;  – stopped early")


def curves(result: Result) -> str:
    """The learning curve of every trial, the best ones on top."""
    drawn = [row for row in result.rows if row.curve]
    if not drawn:
        return ""
    values = [value for row in drawn for _, value in row.curve]
    last = max(step for row in drawn for step, _ in row.curve)
    frame = Frame(axis([0.0, float(last)], is_log=False), axis(worth_showing(values, "minimize")), "steps")
    body = frame.axes()
    for row in sorted(drawn, key=lambda row: row.number in result.best):
        kind = "l1" if row.number in result.best else "l0 thin" if row.status == "finished" else "ls thin"
        title = _trial_title(result, row)
        if len(row.curve) == 1:
            body += frame.dot(*row.curve[0], "d1" if kind == "l1" else "d0", title, 3.4)
        else:
            body += frame.line(row.curve, kind, title)
    names = {_metric(row.curve_metric) for row in drawn}
    return _figure(f"{' and '.join(sorted(names))} by step", body, "strong: the best;  dashed: did not finish")


def parallel(result: Result) -> str:
    """A line for each finished trial through its parameters and metrics; the better the first metric the stronger."""
    rows = [row for row in result.rows if row.values]
    keys = [key for key in (rows[0].params if rows else {}) if len({_shown(row.params.get(key)) for row in rows}) > 1]
    if len(rows) < 2 or not keys:
        return ""
    columns = [_column(result, rows, key) for key in keys]
    ways = enumerate(zip(result.metrics, result.directions, strict=True))
    columns += [_metric_column(rows, index, name, way) for index, (name, way) in ways]
    width, height = max(1000, 180 * len(columns)), 300
    left, right, top, bottom = 20, 90, 34, 20
    xs = [left + index * (width - left - right) / (len(columns) - 1) for index in range(len(columns))]

    def y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    body = ""
    ranked = sorted(rows, key=lambda row: row.values[0] if row.values else 0.0)
    if result.directions[0] == "minimize":
        ranked.reverse()  # the best one is drawn last, on top
    for rank, row in enumerate(ranked):
        path = "L".join(f"{x:.1f} {y(column.shares[row.number]):.1f}" for x, column in zip(xs, columns, strict=True))
        strength = 0.12 + 0.88 * ((rank + 1) / len(ranked)) ** 3
        kind = "l1" if row.number in result.best else "l0"
        title = titled(_trial_title(result, row))
        body += f'<path class="{kind}" style="opacity:{strength:.2f}" d="M{path}">{title}</path>'
    for x, column in zip(xs, columns, strict=True):
        body += f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
        anchor = "start" if x < 60 else "end" if x > width - right + 40 else "middle"
        body += f'<text class="name" x="{x:.1f}" y="16" text-anchor="{anchor}">{escape(column.name)}</text>'
        body += "".join(
            f'<text x="{x + 6:.1f}" y="{y(share) + 4:.1f}">{escape(label)}</text>' for share, label in column.labels
        )
    return _figure("Parameters and what came of them", body, "orange: the best", width, height, "wide")


def importances(result: Result) -> str:
    """How much each parameter matters for the first metric."""
    if not result.importances:
        return ""
    found = sorted(result.importances.items(), key=lambda item: -item[1])
    step = 34
    height = TOP + step * len(found) + 12
    body = ""
    for index, (key, share) in enumerate(found):
        y, width = TOP + index * step, max(2.0, share * (WIDTH - 260))
        body += (
            f'<text class="name" x="190" y="{y + 18}" text-anchor="end">{escape(_short(key))}{titled(key)}</text>'
            f'<rect class="bar" x="200" y="{y + 4}" width="{width:.1f}" height="20" rx="3"/>'
            f'<text x="{208 + width:.1f}" y="{y + 18}">{share:.0%}</text>'
        )
    return _figure("What matters", body, f"share in the {_metric(result.metrics[0])} (PED-ANOVA)", WIDTH, height)


def slices(result: Result) -> list[str]:
    """For each parameter: the first metric over its values."""
    rows = [row for row in result.rows if row.values]
    keys = [key for key in (rows[0].params if rows else {}) if len({_shown(row.params.get(key)) for row in rows}) > 1]
    return [_slice(result, rows, key) for key in keys]


def _slice(result: Result, rows: list[Row], key: str) -> str:
    column = _column(result, rows, key)
    metric = [row.values[0] for row in rows if row.values]
    ticks = [(share, label) for share, label in column.labels]
    shown = axis(worth_showing(metric, result.directions[0]))
    frame = Frame(Axis(-0.04, 1.04, False, ticks), shown, key.lstrip("+"))
    dots = "".join(
        frame.dot(
            column.shares[row.number],
            row.values[0],
            "d1" if row.number in result.best else "d0",
            _trial_title(result, row),
        )
        for row in rows
        if row.values
    )
    return _figure(f"{_metric(result.metrics[0])} over {_short(key)}", frame.axes() + dots, "")


def pareto(result: Result) -> str:
    """The first two metrics against each other; the trials that no other beats are joined."""
    rows = [row for row in result.rows if row.values and len(row.values) > 1]
    if not rows:
        return ""
    pairs = {row.number: (row.values[0], row.values[1]) for row in rows if row.values}
    frame = Frame(
        axis(worth_showing([x for x, _ in pairs.values()], result.directions[0])),
        axis(worth_showing([y for _, y in pairs.values()], result.directions[1])),
        _metric(result.metrics[0]),
    )
    front = sorted(pairs[number] for number in result.best if number in pairs)
    line = frame.line(front, "l1 faint") if len(front) > 1 else ""
    dots = "".join(
        frame.dot(*pairs[row.number], "d1" if row.number in result.best else "d0", _trial_title(result, row))
        for row in rows
    )
    title = f"{_metric(result.metrics[1])} against {_metric(result.metrics[0])}"
    return _figure(title, frame.axes() + line + dots, "orange: the Pareto set")


@dataclass(frozen=True)
class Column:
    """One axis of the parallel coordinates: where each trial is on it, from 0 to 1."""

    name: str
    shares: dict[int, float]
    labels: list[tuple[float, str]]


def _column(result: Result, rows: list[Row], key: str) -> Column:
    numbers = {row.number: _number(row.params.get(key)) for row in rows}
    known = [value for value in numbers.values() if value is not None]
    if len(known) == len(rows) and any(isinstance(row.params.get(key), float | int) for row in rows):
        scale = axis(known, is_log=key in result.log_keys)
        shares = {number: scale.share(value) for number, value in numbers.items() if value is not None}
        return Column(_short(key), shares, [(scale.share(value), label) for value, label in scale.ticks])
    texts = {row.number: _shown(row.params.get(key)) for row in rows}
    order = sorted(set(texts.values()), key=lambda text: (_number(text) is None, _number(text) or 0.0, text))
    places = {text: (index + 0.5) / len(order) for index, text in enumerate(order)}
    return Column(
        _short(key),
        {number: places[text] for number, text in texts.items()},
        [(place, text if len(text) <= 18 else f"{text[:17]}…") for text, place in places.items()],
    )


def _metric_column(rows: list[Row], index: int, name: str, direction: str) -> Column:
    values = {row.number: row.values[index] for row in rows if row.values}
    scale = axis(worth_showing(list(values.values()), direction))
    labels = [(scale.share(value), label) for value, label in scale.ticks]
    return Column(_metric(name), {number: scale.share(value) for number, value in values.items()}, labels)


def _counting(numbers: list[int]) -> Axis:
    """Trials, counted: whole numbers alone."""
    most = max(numbers)
    every = max(1, math.ceil((most + 1) / 10))
    return Axis(-0.5, most + 0.5, False, [(float(n), str(n)) for n in range(0, most + 1, every)])


def _better(result: Result) -> Callable[[float, float], float]:
    return min if result.directions[0] == "minimize" else max


def _trial_title(result: Result, row: Row) -> str:
    params = ", ".join(f"{_short(key)} {_shown(value)}" for key, value in row.params.items())
    values = [
        f"{_metric(name)} {figure(name, value)}" for name, value in zip(result.metrics, row.values or [], strict=False)
    ]
    return f"trial {row.number} ({row.status}): {params}" + (f"; {', '.join(values)}" if values else "")


def _metric(name: str) -> str:
    return words({"eval/loss": "eval_loss", "train/loss": "train_loss"}.get(name, name.rsplit("/", 1)[-1]))


def _short(key: str) -> str:
    return spoken(key.lstrip("+").rsplit(".", 1)[-1])


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _figure(title: str, body: str, note: str, width: int = WIDTH, height: int = HEIGHT, kind: str = "") -> str:
    return (
        f'<figure class="card chart {kind}"><figcaption><h3>{escape(title[:1].upper() + title[1:])}</h3>'
        f"<span>{escape(note)}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )
