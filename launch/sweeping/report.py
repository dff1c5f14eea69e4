"""What a sweep leaves: sweep.json, sweep.html, the best trials as experiments, and a table on the screen."""

import orjson
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.launch.sweeping.experiment import experiment_commands, write_experiments
from tunesmith.launch.sweeping.page import render_page
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.result import SweepResult, read_result
from tunesmith.launch.sweeping.trials import Trials
from tunesmith.train.files.durable import write_atomically
from tunesmith.train.printable import printable
from tunesmith.train.redact import redact
from tunesmith.train.track.console import duration

JSON, PAGE = "sweep.json", "sweep.html"
TURN_SECONDS = 10.0  # that a driver waits while another one writes the same files


def write_report(plan: SweepPlan, trials: Trials) -> SweepResult:
    """Writes all files anew from what there is; at any moment of the sweep, by any of its drivers."""
    result = read_result(plan, trials)
    try:
        with FileLock(plan.claims / "report.lock", timeout=TURN_SECONDS):
            write_experiments(plan, result)
            options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
            write_atomically(plan.folder / JSON, orjson.dumps(redact(result.as_dict()), option=options) + b"\n")
            page = render_page(result, experiment_commands(plan, result.best))
            write_atomically(plan.folder / PAGE, page.encode())
    except Timeout:
        pass  # the other one has the same trials to tell of
    return result


def show_table(result: SweepResult) -> None:
    """The trials, best first."""
    table = Table(title=f"{result.name}: {', '.join(f'{n} {s}' for s, n in result.counts().items())}")
    last_words = [name.rsplit(".", 1)[-1] for name in result.columns]
    for word, name in zip(last_words, result.columns, strict=True):
        table.add_column(word if last_words.count(word) == 1 else name, overflow="fold")
    table.add_column("time", overflow="fold")
    done = sorted(result.done, key=lambda row: row.value, reverse=result.direction == "maximize")
    for row in [*done, *(row for row in result.rows if not row.values)]:
        style = "bold green" if row.number in result.best else "red" if row.status == "failed" else None
        table.add_row(*[Text(printable(cell)) for cell in (*result.cells(row), duration(row.seconds))], style=style)
    Console().print(table)
