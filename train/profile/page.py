"""profile.html: one file without any address in it, in the style of a run's report."""

from html import escape

from tunesmith.train.profile import charts
from tunesmith.train.profile.advice import Advice
from tunesmith.train.profile.analysis import Profile, Row
from tunesmith.train.profile.breakdown import PARTS, waiting_words
from tunesmith.train.profile.charts import CATEGORIES, milli, rate, share_of, size
from tunesmith.train.profile.memory import KINDS
from tunesmith.train.track.report_html import STYLE

COLORS = """
:root{--c0:#3867c8;--c1:#7aa0ea;--c2:#2c8f86;--c3:#d97a1e;--c4:#e8b54a;--c5:#b6413b;--c6:#c9ccd1;--c7:#8a62b8;--c8:#5c8a3a;
--ontop:#fff}
@media(prefers-color-scheme:dark){:root{--c0:#5b86e0;--c1:#93b1f2;--c2:#49aaa0;--c3:#e08a3c;--c4:#d9ab4d;--c5:#d9655e;
--c6:#565c66;--c7:#a886d3;--c8:#83b35c;--ontop:#12151a}}
"""
PROFILE_STYLE = (
    COLORS
    + "".join(f".c{i}{{fill:var(--c{i});background:var(--c{i})}}" for i in range(9))
    + """
.dot{background:none!important;font-size:13px;color:var(--soft);margin-right:14px;white-space:nowrap}
.dot::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px;background:inherit}
"""
    + "".join(f".dot.c{i}::before{{background:var(--c{i})}}" for i in range(9))
    + """
.bar{width:100%;height:32px;margin:0;border-radius:6px;overflow:hidden}
.bar text{fill:var(--ontop);font-size:12px}.bar .c6+text,.bar .c4+text{fill:var(--ink)}
.pad{padding:16px 18px}.pad p{margin:10px 0 0;color:var(--soft);font-size:14px}
.chart p{color:var(--soft);font-size:13px}
table.wide td,table.wide th{width:auto;text-align:right;padding:7px 12px;white-space:nowrap}
table.wide td:first-child,table.wide th:first-child,table.wide .left{text-align:left}
table.wide td:first-child,table.wide td code{white-space:normal;color:var(--ink)}
th{font-weight:500;font-size:13px;color:var(--soft);border-bottom:1px solid var(--rule)}
td.wide{width:56%!important}td.wide .bar,td.wide svg{height:20px}
ol{margin:0;padding:0;list-style:none}
ol li{display:grid;grid-template-columns:74px 1fr;gap:2px 12px;padding:14px 18px;border-top:1px solid var(--rule)}
ol li:first-child{border-top:0}
ol b{font-size:20px;font-weight:620;color:var(--good);grid-row:1/3}
ol code,td code{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
ol span{color:var(--soft);font-size:14px}
.area{stroke:none}.roof{stroke:var(--soft);stroke-dasharray:none}.cut{stroke:var(--soft);stroke-dasharray:2 4}
.scroll{overflow-x:auto}
"""
)
MOST_RANKS = 16  # shown
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(profile: Profile, advice: list[Advice]) -> str:
    """The whole page; what comes from the trace is escaped, and nothing on it runs or loads."""
    first, last = profile.steps
    name, ceilings = escape(profile.name), profile.ceilings
    subtitle = (
        f"steps {first:,} to {last:,}  ·  {escape(ceilings.device)}  ·  {escape(ceilings.dtype)}  ·  "
        f"measured ceilings: {rate(ceilings.flops, 'FLOP/s')}, {rate(ceilings.bytes_per_second, 'B/s')}"
    )
    if profile.recording is not None:
        subtitle += f"  ·  recorded, a step takes {milli(profile.recording)} longer"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name} · profile · Tunesmith</title><style>{STYLE}{PROFILE_STYLE}</style></head>
<body><main><header><div class="top"><h1>{name}</h1><span class="pill">profile</span></div><p>{subtitle}</p></header>
{tiles(profile)}{advice_html(advice)}{step_html(profile)}{ranks_html(profile)}
<div class="charts">{figure("Roofline", charts.roofline(profile), roofline_keys(profile))}{memory_html(profile)}</div>
{table_html("Kinds of work", profile.analysis.categories, profile)}
{table_html("Costliest operations", profile.analysis.top, profile)}{stalls_html(profile)}
<footer>Written by Tunesmith from the trace beside it: open trace.json.gz at ui.perfetto.dev. Work is counted from the
shapes of operations; a dash is work that no shape tells. docs/profiling.md says how each figure is made.</footer>
</main></body></html>
"""


def tiles(profile: Profile) -> str:
    analysis, breakdown = profile.analysis, profile.analysis.breakdown
    flops = sum(row.flops for row in analysis.categories)
    shown = [
        (milli(breakdown.step), "a step"),
        (rate(flops / breakdown.step, ""), "FLOP/s of the whole step"),
        (f"{breakdown.share('data wait'):.1%}", "data wait"),
        (f"{breakdown.share('communication'):.1%}", "communication, not hidden"),
        (f"{breakdown.share('idle'):.1%}", "device idle"),
    ]
    if analysis.memory:
        shown.append((size(analysis.memory.peak_bytes), "peak memory"))
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>' for value, name in shown)
    return f'<div class="tiles">{cells}</div>'


def advice_html(advice: list[Advice]) -> str:
    items = "".join(
        f"<li><b>{item.gain:.2f}x</b><code>{escape(item.do)}</code><span>{escape(item.why)}</span></li>"
        for item in advice
    )
    none = '<div class="pad">No setting would make this step 2 % faster, as far as these figures tell.</div>'
    body = f"<ol>{items}</ol>" if items else none
    return f'<h2>What to change, with its gain at most</h2><div class="card">{body}</div>'


def step_html(profile: Profile) -> str:
    breakdown = profile.analysis.breakdown
    hidden = breakdown.overlapped / breakdown.communication if breakdown.communication else 0.0
    words = f"communication in all {milli(breakdown.communication)}, {hidden:.0%} of it while the device computed"
    idle = ", ".join(f"{phase} {milli(seconds)}" for phase, seconds in breakdown.idle_in.items() if seconds > 1e-5)
    shown = [part for part, seconds in breakdown.parts.items() if seconds]
    return (
        f'<h2>The step</h2><div class="card pad">{charts.step_bar(profile)}<p>{charts.legend(PARTS, shown)}</p>'
        f"<p>{words if breakdown.communication else 'no communication'}.{f' Idle in: {escape(idle)}.' if idle else ''} "
        f"{profile.analysis.num_launches:,.0f} operations of the device.</p></div>"
    )


def ranks_html(profile: Profile) -> str:
    if len(profile.ranks) < 2:
        return ""
    shown = [part for part in PARTS if any(rank.parts[part] for rank in profile.ranks)]
    ranks = profile.ranks
    if len(ranks) > MOST_RANKS:  # those that the others wait for, and those that wait most
        by_wait = sorted(ranks, key=lambda rank: rank.waits)
        ranks = by_wait[: MOST_RANKS // 2] + by_wait[-MOST_RANKS // 2 :]
    head = "<tr><th></th><th></th><th>own work</th><th>communication</th><th>waits</th></tr>"
    return (
        f'<h2>Ranks</h2><div class="card scroll"><table class="wide">{head}{charts.ranks_bars(ranks)}</table>'
        f'<div class="pad">{charts.legend(PARTS, shown)}<p>{escape(waiting_words(profile.ranks))}</p></div></div>'
    )


def figure(title: str, picture: str, keys: str) -> str:
    if not picture:
        return ""
    return f'<figure class="card chart"><figcaption><h3>{title}</h3></figcaption>{picture}<p>{keys}</p></figure>'


def roofline_keys(profile: Profile) -> str:
    return charts.legend(CATEGORIES, [row.name for row in profile.analysis.categories if row.flops and row.num_bytes])


def memory_html(profile: Profile) -> str:
    memory = profile.analysis.memory
    if memory is None:
        return ""
    keys = "".join(
        f'<span class="dot {charts.color(KINDS, kind)}">{kind} {size(held)}</span>'
        for kind, held in memory.peak.items()
        if held
    )
    largest = ", ".join(f"{count} x {size(num_bytes)} in {phase}" for count, num_bytes, phase in memory.largest)
    keys += f"<br>largest: {escape(largest)}" if largest else ""
    return figure(f"Memory, {size(memory.peak_bytes)} at the peak", charts.memory_chart(memory), keys)


def table_html(title: str, rows: list[Row], profile: Profile) -> str:
    step = profile.analysis.breakdown.step
    head = "<th>ms</th><th>of the step</th><th>calls</th><th>FLOP/s</th><th>B/s</th><th>of its ceiling</th>"
    kind = rows is profile.analysis.top
    body = "".join(
        f"<tr><td>{f'<code>{escape(row.name)}</code>' if kind else escape(row.name)}</td>"
        f"{f'<td class=left>{escape(row.category)}</td>' if kind else ''}<td>{1000 * row.seconds:.3g}</td>"
        f"<td>{row.seconds / step:.1%}</td><td>{row.count:,.0f}</td><td>{rate(row.flops_per_second, '')}</td>"
        f"<td>{rate(row.bytes_per_second, '')}</td><td>{share_of(row, profile)}</td></tr>"
        for row in rows
    )
    extra = "<th class=left>kind</th>" if kind else ""
    table = f'<table class="wide"><tr><th></th>{extra}{head}</tr>{body}</table>'
    return f'<h2>{title}</h2><div class="card scroll">{table}</div>'


def stalls_html(profile: Profile) -> str:
    rows = profile.analysis.stalls
    if not rows:
        return ""
    body = "".join(
        f"<tr><td><code>{escape(row.what)}</code></td><td class=left>{escape(row.phase)}</td>"
        f"<td class=left><code>{escape(row.where)}</code></td><td>{row.count:.3g}</td>"
        f"<td>{1000 * row.seconds:.3g}</td></tr>"
        for row in rows
    )
    head = "<tr><th></th><th class=left>phase</th><th class=left>from</th><th>a step</th><th>ms a step</th></tr>"
    note = "Each makes the host wait for a GPU; profile.stacks=true names the line of code."
    return (
        f'<h2>Waits for the device</h2><div class="card scroll"><table class="wide">{head}{body}</table>'
        f'<div class="pad"><p>{note}</p></div></div>'
    )
