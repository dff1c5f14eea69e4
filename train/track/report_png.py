"""How report.png looks: the run in one picture, for a README or a chat. 1600 x 1000 pixels."""

import io
from typing import Any

from tunesmith.train.track.report_data import (
    CHARTS,
    Chart,
    ReportedRun,
    headline,
    moving_average,
    nice_ticks,
    subtitle,
    thinned,
    tick_labels,
    value_range,
)

INK, SOFT, GRID, PAGE = "#22252b", "#6b7280", "#ecece7", "#ffffff"
COLOURS = ("#3867c8", "#d97a1e")
LEFT, RIGHT = 0.065, 0.97
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#d8d8d3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "savefig.facecolor": PAGE,
}


def render_png(run: ReportedRun) -> bytes:
    """A PNG of the headline figures over the charts."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as pyplot has
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        # Small in inches, so that the words can still be read where a README shows it at half its size.
        picture = Figure(figsize=(12, 7.5), dpi=1600 / 12)
        FigureCanvasAgg(picture)
        picture.text(LEFT, 0.938, run.name, fontsize=23, fontweight="bold", va="center", parse_math=False)
        picture.text(LEFT, 0.885, subtitle(run), fontsize=11.5, color=SOFT, va="center", parse_math=False)
        draw_tiles(picture, run)
        grid = {"left": LEFT, "right": RIGHT, "top": 0.685, "bottom": 0.06, "hspace": 0.42, "wspace": 0.15}
        for panel, chart in zip(picture.subplots(2, 2, gridspec_kw=grid).flat, CHARTS, strict=True):
            draw_chart(panel, run, chart)
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()


def draw_tiles(picture: Any, run: ReportedRun) -> None:
    tiles = headline(run)
    for index, (label, value) in enumerate(tiles):
        left = LEFT + index * (RIGHT - LEFT) / max(len(tiles), 5)
        picture.text(left, 0.81, value, fontsize=17, fontweight="bold", va="center")
        picture.text(left, 0.772, label, fontsize=10.5, color=SOFT, va="center")


def draw_chart(panel: Any, run: ReportedRun, chart: Chart) -> None:
    panel.set_title(chart.title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=9)
    drawn = [(line, points) for line in chart.lines if (points := run.points(line.metric))]
    if not drawn:
        panel.text(0.5, 0.5, "no values", color=SOFT, ha="center", va="center", transform=panel.transAxes)
        panel.set_xticks([])
        panel.set_yticks([])
        return
    for colour, (line, points) in zip(COLOURS, drawn, strict=False):
        smooth = line.smooth and len(points) >= 40
        marker = "o" if len(points) == 1 or (line.markers and len(points) <= 60) else None
        if smooth:
            panel.plot(*zip(*thinned(points, 1500), strict=True), color=colour, alpha=0.25, linewidth=1)
        curve = moving_average(points) if smooth else thinned(points, 1500)
        panel.plot(
            *zip(*curve, strict=True), color=colour, linewidth=1.9, marker=marker, markersize=5.5, label=line.label
        )
    if len(drawn) > 1:
        panel.legend(frameon=False, loc="upper right", fontsize=11, labelcolor=SOFT)
    ticks = nice_ticks(*value_range(chart, [points for _, points in drawn]), 5)
    panel.set_yticks(ticks, tick_labels(ticks))
    panel.set_ylim(ticks[0], ticks[-1] + 0.02 * (ticks[-1] - ticks[0]))  # a line at the top stays whole
    panel.margins(x=0.01)
    panel.set_xlabel("step", loc="right", color=SOFT, labelpad=1)
    panel.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    panel.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
