"""sweep.html: one file without any address or script in it, in the look of a run's report."""

from html import escape

from tunesmith.launch.sweeping import charts
from tunesmith.launch.sweeping.result import SweepResult, TrialRow
from tunesmith.train.track.console import duration, figure
from tunesmith.train.track.report_data import words
from tunesmith.train.track.report_html import STYLE, table_html

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
ALSO_SHOWN = (
    "eval/exact_match",
    "throughput/tokens_per_second",
    "memory/peak_memory_gib",
)  # where there are such


def render_page(result: SweepResult, experiments: dict[int, str]) -> str:
    """The whole page. What comes from the trials is escaped, and the policy lets nothing load or run.

    experiments: the command that runs each of the best trials again.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    drawn = [charts.history(result), charts.pareto(result), charts.curves(result), charts.parallel(result)]
    drawn += [charts.importances(result), *charts.slices(result)]
    again = "Run the best again" if len(experiments) == 1 else "Run one of the Pareto set again"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(result.name)} · Tunesmith sweep</title><style>{STYLE}{OWN_STYLE}</style></head>
<body><main>{_header(result)}
{table_html(again, [(f"trial {number}", command) for number, command in experiments.items()])}
<div class="charts">{"".join(drawn)}</div>
{_table(result)}
<footer>Written by Tunesmith from the trials' metrics.jsonl and summary.json, and the sweep's database.</footer>
</main></body></html>
"""


def _header(result: SweepResult) -> str:
    kind = "pill" if result.status == "finished" else "pill bad"
    said = ", ".join(f"{count} {status}" for status, count in result.counts().items()) or "no trial yet"
    goals = ", ".join(f"{name} {goal}d" for name, goal in result.metrics.items())
    tiles = {"trials": f"{len(result.rows)} of {result.num_trials}", "hours": f"{result.hours:.2f}"}
    if result.gpu_hours:
        tiles["GPU-hours"] = f"{result.gpu_hours:.2f}"
    best = [row for row in result.done if row.number in result.best]
    if best and len(result.metrics) == 1:
        name = f"best {words(result.metric.rsplit('/', 1)[-1])}"
        tiles = {name: figure(result.metric, best[0].value), "best trial": str(best[0].number)} | tiles
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles.items()
    )
    pill = f'<span class="{kind}">{escape(result.status)}</span>'
    return (
        f'<header><div class="top"><h1>{escape(result.name)}</h1>{pill}</div>'
        f'<p>{escape(goals)}  ·  {escape(said)}</p></header><div class="tiles">{boxes}</div>'
    )


def _table(result: SweepResult) -> str:
    if not result.rows:
        return ""
    known = {name for row in result.rows for name in row.figures} - set(result.metrics)
    also = [name for name in ALSO_SHOWN if name in known]
    head = "".join(f"<th>{escape(name)}</th>" for name in (*result.columns, *also, "time", "cause"))
    body = "".join(_table_row(result, row, also) for row in result.rows)
    return f'<h2>Trials</h2><div class="card scroll"><table class="trials"><tr>{head}</tr>{body}</table></div>'


def _table_row(result: SweepResult, row: TrialRow, also: list[str]) -> str:
    cells = [*result.cells(row), *(figure(name, row.figures.get(name)) for name in also), duration(row.seconds)]
    inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    kind = ' class="best"' if row.number in result.best else ""
    return f'<tr{kind}>{inner}<td class="cause">{escape(row.cause or "")}</td></tr>'
