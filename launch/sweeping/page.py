"""sweep.html: one file without any address or script in it, in the look of a run's report."""

from html import escape

from tunesmith.launch.sweeping import charts
from tunesmith.launch.sweeping.result import Result, Row
from tunesmith.train.track.console import duration, figure
from tunesmith.train.track.report_data import words
from tunesmith.train.track.report_html import STYLE

OWN_STYLE = """
.wide{grid-column:1/-1}.faint{opacity:.45}.thin{stroke-width:1.3;opacity:.5}.ls{stroke:var(--soft);stroke-dasharray:4 3}
.bar{fill:var(--line0)}svg text.name{fill:var(--ink)}svg text.bad-mark{fill:var(--bad);font-size:15px}
svg path:hover{opacity:1!important;stroke-width:3}
.scroll{overflow-x:auto}th{font-weight:600;font-size:13px;text-align:left;padding:10px 14px;
color:var(--soft);white-space:nowrap}
.trials td{padding:7px 14px;width:auto;white-space:nowrap;overflow-wrap:normal}
.trials td.cause{white-space:normal;min-width:260px;color:var(--bad);font-size:13px}
.trials tr.best td{background:var(--goodbg)}
"""


def render_page(result: Result, experiments: dict[int, str]) -> str:
    """The whole page. What comes from the trials is escaped, and the policy lets nothing load or run.

    experiments: the command that runs each of the best trials again.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    drawn = [charts.history(result), charts.pareto(result) or charts.curves(result)]
    drawn += [charts.curves(result)] if charts.pareto(result) else []
    drawn += [charts.parallel(result), charts.importances(result), *charts.slices(result)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(result.name)} · Tunesmith sweep</title><style>{STYLE}{OWN_STYLE}</style></head>
<body><main>{_header(result)}
{_commands(result, experiments)}
<div class="charts">{"".join(drawn)}</div>
{_table(result)}
<footer>Written by Tunesmith from the trials' metrics.jsonl and summary.json, and the sweep's database.</footer>
</main></body></html>
"""


def _header(result: Result) -> str:
    counts = result.counts()
    kind = "pill" if result.status == "finished" else "pill bad"
    said = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no trial yet"
    goals = ", ".join(f"{name} {goal}d" for name, goal in zip(result.metrics, result.directions, strict=True))
    tiles = [("trials", f"{len(result.rows)} of {result.num_trials}"), ("hours", f"{result.hours:.2f}")]
    if result.gpu_hours:
        tiles.append(("GPU-hours", f"{result.gpu_hours:.2f}"))
    best = next((row for row in result.rows if row.number in result.best), None)
    if best is not None and best.values and len(result.metrics) == 1:
        tiles.insert(
            0, (f"best {words(result.metrics[0].rsplit('/', 1)[-1])}", figure(result.metrics[0], best.values[0]))
        )
        tiles.insert(1, ("best trial", str(best.number)))
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles
    )
    pill = f'<span class="{kind}">{escape(result.status)}</span>'
    return (
        f'<header><div class="top"><h1>{escape(result.name)}</h1>{pill}</div>'
        f'<p>{escape(goals)}  ·  {escape(said)}</p></header><div class="tiles">{boxes}</div>'
    )


def _commands(result: Result, experiments: dict[int, str]) -> str:
    if not experiments:
        return ""
    title = "Run the best again" if len(experiments) == 1 else "Run one of the Pareto set again"
    rows = "".join(f"<tr><td>trial {number}</td><td>{escape(text)}</td></tr>" for number, text in experiments.items())
    return f'<section><h2>{title}</h2><div class="card"><table>{rows}</table></div></section>'


def _table(result: Result) -> str:
    if not result.rows:
        return ""
    keys = list(dict.fromkeys(key for row in result.rows for key in row.params))
    extra = sorted({name for row in result.rows for name in row.figures} - set(result.metrics))
    shown = [name for name in extra if name in ("eval/exact_match", "throughput/tokens_per_second")]
    shown += ["memory/peak_memory_gib"] if "memory/peak_memory_gib" in extra else []
    names = ["trial", "status", *result.metrics, *keys, *shown, "time", "cause"]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(_table_row(result, row, keys, shown) for row in result.rows)
    return f'<h2>Trials</h2><div class="card scroll"><table class="trials"><tr>{head}</tr>{body}</table></div>'


def _table_row(result: Result, row: Row, keys: list[str], shown: list[str]) -> str:
    values: list[float | None] = [*row.values] if row.values else [None] * len(result.metrics)
    cells = [str(row.number), row.status]
    cells += [figure(name, value) for name, value in zip(result.metrics, values, strict=True)]
    cells += [_param(row.params.get(key)) for key in keys]
    cells += [figure(name, row.figures.get(name)) for name in shown]
    cells.append(duration(row.seconds))
    inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    kind = ' class="best"' if row.number in result.best else ""
    return f'<tr{kind}>{inner}<td class="cause">{escape(row.cause or "")}</td></tr>'


def _param(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
