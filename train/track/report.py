"""A run at a glance: report.html and report.png from the files a run leaves."""

from pathlib import Path

from tunesmith.train.files.durable import write_atomically
from tunesmith.train.track.report_data import read_run
from tunesmith.train.track.report_html import render_html
from tunesmith.train.track.report_png import render_png


def write_report(run_dir: Path) -> None:
    """Writes <run>/report.html and <run>/report.png."""
    run = read_run(run_dir)
    write_atomically(run_dir / "report.html", render_html(run).encode())
    write_atomically(run_dir / "report.png", render_png(run))
