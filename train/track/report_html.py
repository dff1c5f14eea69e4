"""How report.html looks: one file without any address in it, light or dark as the reader's system is."""

import base64
import hashlib
from html import escape

import orjson
import yaml

from tunesmith.train.track.report_data import (
    CHARTS,
    Chart,
    Line,
    Points,
    ReportedRun,
    fact_rows,
    headline,
    moving_average,
    nice_ticks,
    result_rows,
    subtitle,
    thinned,
    tick_labels,
    value_range,
)

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 28

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#22252b;--soft:#6b7280;--rule:#e6e6e1;--grid:#efefeb;
--line0:#3867c8;--line1:#d97a1e;--good:#2c7d4f;--bad:#b6413b;--goodbg:#e8f3ec;--badbg:#faeae8}
@media(prefers-color-scheme:dark){:root{--page:#15171b;--card:#1d2026;--ink:#e4e6ea;--soft:#949ba8;--rule:#2c3038;
--grid:#282c33;--line0:#82a8f4;--line1:#f0a45c;--good:#6fc793;--bad:#ee8a83;--goodbg:#1c3026;--badbg:#3a2322}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1080px;margin:0 auto;padding:44px 24px 56px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;font-weight:620;margin:40px 0 12px}
h3{font-size:14px;font-weight:600;margin:0}
header p{margin:6px 0 0;color:var(--soft)}
.top{display:flex;align-items:center;gap:14px;flex-wrap:wrap}
.pill{font-size:13px;font-weight:600;padding:2px 11px;border-radius:99px;color:var(--good);background:var(--goodbg)}
.pill.bad{color:var(--bad);background:var(--badbg)}
.error{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--badbg);color:var(--bad);border-radius:10px;
padding:12px 16px;margin:20px 0 0;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
.tiles,.charts{display:grid;gap:14px;margin-top:26px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));margin-top:14px}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tile{padding:14px 18px}
.tile b{display:block;font-size:25px;font-weight:620;letter-spacing:-.02em;line-height:1.25;white-space:nowrap}
.tile span{color:var(--soft);font-size:13px}
.tile b,td,.read,svg text{font-variant-numeric:tabular-nums}
.chart{padding:14px 16px 6px;margin:0}
.chart figcaption{display:flex;gap:16px;align-items:baseline;flex-wrap:wrap;font-size:13px;color:var(--soft)}
.chart h3{color:var(--ink)}
.read{margin-left:auto;color:var(--ink)}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:3px}
.key0::before{background:var(--line0)}.key1::before{background:var(--line1)}
svg{display:block;width:100%;height:auto;margin-top:8px;touch-action:pan-y}
svg text{fill:var(--soft);font-size:11.5px}
.grid{stroke:var(--grid)}.axis{stroke:var(--rule)}.cross{stroke:var(--soft);stroke-dasharray:3 3;visibility:hidden}
path{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.l0{stroke:var(--line0)}.l1{stroke:var(--line1)}.raw{opacity:.28;stroke-width:1}
circle{stroke:var(--card);stroke-width:1.5}.d0{fill:var(--line0)}.d1{fill:var(--line1)}
.bad-step{stroke:var(--bad);stroke-width:1.5}
.columns{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));align-items:start}
.columns h2{margin-bottom:12px}
table{width:100%;border-collapse:collapse}
td{padding:8px 18px;border-top:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}
tr:first-child td{border-top:0}
td:first-child{color:var(--soft);width:46%}
.sample{padding:14px 18px;margin-bottom:10px;display:grid;grid-template-columns:26px 1fr;gap:2px 8px}
.mark{font-weight:700;color:var(--good)}.wrong .mark{color:var(--bad)}
.sample p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;grid-column:2}
.sample .mark{grid-column:1;grid-row:1}
.prompt{font-weight:560}
.sample small{color:var(--soft);font-size:13px;display:block}
details{margin-top:14px;padding:12px 18px}
summary{cursor:pointer;font-weight:600}
pre{overflow:auto;font:12.5px/1.55 ui-monospace,Menlo,Consolas,monospace;margin:12px 0 4px}
footer{margin-top:36px;color:var(--soft);font-size:13px}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""

# Shows the values at the pointer. The figures stand in data-lines, the axes in data-x: [first step, last step].
SCRIPT = f"""
document.querySelectorAll('figure').forEach(f=>{{
const s=f.querySelector('svg'),r=f.querySelector('.read'),rest=r.textContent,
c=f.querySelector('.cross'),lines=JSON.parse(f.dataset.lines),[a,b]=JSON.parse(f.dataset.x);
const near=(p,x)=>p.reduce((m,q)=>Math.abs(q[0]-x)<Math.abs(m[0]-x)?q:m,p[0]);
s.addEventListener('pointermove',e=>{{const box=s.getBoundingClientRect(),
u=((e.clientX-box.left)/box.width*{WIDTH}-{LEFT})/{WIDTH - LEFT - RIGHT},
x=a+Math.min(1,Math.max(0,u))*(b-a),at=near(lines[0].points,x)[0],
px={LEFT}+(b>a?(at-a)/(b-a):0)*{WIDTH - LEFT - RIGHT};
c.setAttribute('x1',px);c.setAttribute('x2',px);c.style.visibility='visible';
r.textContent='step '+at.toLocaleString('en')+':  '+lines.map(l=>{{const q=near(l.points,at);
return l.label+' '+Number(q[1].toPrecision(4)).toLocaleString('en',{{maximumSignificantDigits:4}})}}).join(',  ')}});
s.addEventListener('pointerleave',()=>{{c.style.visibility='hidden';r.textContent=rest}})}});
"""


def render_html(run: ReportedRun) -> str:
    """The whole page. What comes from the run is escaped, and the policy lets nothing load or run but what is here."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    charts = "".join(chart_html(run, chart) for chart in CHARTS)
    results, facts = table_html("Results", result_rows(run)), table_html("Run", fact_rows(run))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(run.name)} · Tunesmith</title><style>{STYLE}</style></head>
<body><main>{header_html(run)}
<div class="charts">{charts}</div>
<div class="columns">{results}{facts}</div>
{samples_html(run)}{config_html(run)}
<footer>Written by Tunesmith from metrics.jsonl, samples.jsonl, summary.json and config.yaml of this run.</footer>
</main><script>{SCRIPT}</script></body></html>
"""


def header_html(run: ReportedRun) -> str:
    pill = "pill" if run.status == "finished" else "pill bad"
    tiles = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in headline(run))
    error = run.result("error")
    return (
        f'<header><div class="top"><h1>{escape(run.name)}</h1><span class="{pill}">{escape(run.status)}</span></div>'
        f"<p>{escape(subtitle(run))}</p></header>"
        + (f'<div class="error">{escape(str(error))}</div>' if error else "")
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
    )


def table_html(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<section><h2>{title}</h2><div class="card"><table>{body}</table></div></section>'


def samples_html(run: ReportedRun) -> str:
    if not run.samples:
        return ""
    cards = "".join(sample_html(sample) for sample in run.samples)
    return f"<h2>Answers to validation questions</h2>{cards}"


def sample_html(sample: dict[str, object]) -> str:
    prompt, expected, generated = (escape(str(sample.get(key, ""))) for key in ("prompt", "expected", "generated"))
    if sample.get("exact"):
        return (
            f'<div class="card sample"><span class="mark" title="exactly the expected answer">✓</span>'
            f'<p class="prompt">{prompt}</p><p>{generated}</p></div>'
        )
    return (
        f'<div class="card sample wrong"><span class="mark" title="not the expected answer">✗</span>'
        f'<p class="prompt">{prompt}</p><p>{generated}</p><p><small>expected</small>{expected}</p></div>'
    )


def config_html(run: ReportedRun) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return f'<details class="card"><summary>Configuration</summary><pre>{escape(text)}</pre></details>'


def chart_html(run: ReportedRun, chart: Chart) -> str:
    """A figure with its lines; nothing where the run has no values for it."""
    drawn = [(line, points) for line in chart.lines if (points := run.points(line.metric))]
    if not drawn:
        return ""
    frame = Frame(chart, [points for _, points in drawn])
    body = "".join(line_svg(frame, index, line, points) for index, (line, points) in enumerate(drawn))
    body += "".join(
        f'<line class="bad-step" x1="{frame.x(step):.1f}" x2="{frame.x(step):.1f}" y1="{HEIGHT - BOTTOM - 8}" '
        f'y2="{HEIGHT - BOTTOM}"><title>not finite at step {step}</title></line>'
        for line, _ in drawn
        for step in run.nonfinite_steps(line.metric)
        if frame.first <= step <= frame.last
    )
    keys = "".join(f'<span class="key key{i}">{escape(line.label)}</span>' for i, (line, _) in enumerate(drawn))
    last = ",  ".join(f"{line.label} {points[-1][1]:.4g}" for line, points in drawn) if len(drawn) > 1 else ""
    data = orjson.dumps([{"label": line.label, "points": thinned(points, 400)} for line, points in drawn]).decode()
    return (
        f'<figure class="card chart" data-x="[{frame.first},{frame.last}]" data-lines="{escape(data)}">'
        f'<figcaption><h3>{escape(chart.title)}</h3>{keys if len(drawn) > 1 else ""}<span class="read">{last}</span>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)} by step">'
        f'{frame.axes()}{body}<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


class Frame:
    """The axes of a chart: maps steps and values to the picture."""

    def __init__(self, chart: Chart, series: list[Points]) -> None:
        steps = [step for points in series for step, _ in points]
        self.first, self.last = min(steps), max(steps)
        if self.first < 0.05 * self.last:
            self.first = 0
        low, high = value_range(chart, series)
        self.ticks = nice_ticks(low, high, 5)
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        right = WIDTH - RIGHT
        rows = "".join(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{label}</text>'
            for tick, label in zip(self.ticks, tick_labels(self.ticks), strict=True)
        )
        steps = [step for step in nice_ticks(self.first, self.last, 6) if self.first <= step <= self.last]
        steps = [step for step in steps if step.is_integer()] or [float(self.first)]
        columns = "".join(
            f'<text x="{self.x(step):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{label}</text>'
            for step, label in zip(steps[:-1], tick_labels(steps), strict=False)
        )
        base = f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        unit = f'<text x="{right}" y="{HEIGHT - 9}" text-anchor="end">{self.last:,} steps</text>'
        return rows + base + columns + unit


def line_svg(frame: Frame, index: int, line: Line, points: Points) -> str:
    smooth = line.smooth and len(points) >= 40
    paths = [path_svg(frame, thinned(points), f"l{index}{' raw' if smooth else ''}")]
    if smooth:
        paths.append(path_svg(frame, thinned(moving_average(points), 300), f"l{index}"))
    if line.markers and len(points) <= 60:
        paths += [
            f'<circle class="d{index}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="3.6"/>'
            for step, value in points
        ]
    return "".join(paths)


def path_svg(frame: Frame, points: Points, classes: str) -> str:
    if len(points) == 1:
        return (
            f'<circle class="d{classes[1]}" cx="{frame.x(points[0][0]):.1f}" cy="{frame.y(points[0][1]):.1f}" r="3.6"/>'
        )
    line = "L".join(f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in points)
    return f'<path class="{classes}" d="M{line}"/>'
