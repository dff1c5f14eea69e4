"""A run at a glance: report.html and report.png from the files a run leaves."""

from pathlib import Path

from tunesmith.train.files.durable import write_atomically
from tunesmith.train.track.report_data import read_run
from tunesmith.train.track.report_html import render_html
from tunesmith.train.track.report_png import render_png


def write_report(run_dir: Path) -> str:
    """Writes <run>/report.html and <run>/report.png; returns what it has to say of them, if anything."""
    run = read_run(run_dir)
    write_atomically(run_dir / "report.html", render_html(run).encode())
    try:
        picture = render_png(run)
    except ModuleNotFoundError as error:
        return f"no report.png without {error.name}: pip install 'tunesmith[report]'; report.html has the charts"
    write_atomically(run_dir / "report.png", picture)
    return ""
