"""What a sweep leaves: sweep.json, sweep.html, the best trials as experiments, and a table on the screen."""

import shlex

import orjson
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.launch.sweeping.experiment import write_experiment
from tunesmith.launch.sweeping.page import render_page
from tunesmith.launch.sweeping.plan import Plan
from tunesmith.launch.sweeping.result import Result, Row, read_result
from tunesmith.launch.sweeping.trials import Trials
from tunesmith.train.files.durable import write_atomically
from tunesmith.train.redact import redact
from tunesmith.train.track.console import duration, figure

JSON, PAGE = "sweep.json", "sweep.html"
TURN_SECONDS = 10.0  # that a driver waits while another one writes the same files


def write_report(plan: Plan, trials: Trials) -> Result:
    """Writes all files anew from what there is; at any moment of the sweep, by any of its drivers."""
    result = read_result(plan, trials)
    try:
        with FileLock(plan.folder / "claims" / "report.lock", timeout=TURN_SECONDS):
            experiments = _experiments(plan, result)
            options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
            write_atomically(plan.folder / JSON, orjson.dumps(redact(result.as_dict()), option=options) + b"\n")
            write_atomically(plan.folder / PAGE, render_page(result, experiments).encode())
    except Timeout:
        pass  # the other one has the same trials to tell of
    return result


def _experiments(plan: Plan, result: Result) -> dict[int, str]:
    """Writes the experiment of each of the best trials; returns the commands that run them."""
    commands = {}
    best = [row for row in result.rows if row.number in result.best]
    for row in best:
        name = experiment_name(plan, row.number, len(result.metrics))
        values = ", ".join(
            f"{metric} {figure(metric, value)}" for metric, value in zip(result.metrics, row.values or [], strict=True)
        )
        write_experiment(
            plan, row.number, row.params, name, f"Trial {row.number} of the sweep {result.name}: {values}."
        )
        commands[row.number] = experiment_commands(plan, [row.number])[0]
    wanted = {f"{experiment_name(plan, row.number, len(result.metrics))}.yaml" for row in best}
    for path in (plan.folder / "conf" / "exp").glob("*.yaml"):
        if path.name not in wanted:
            path.unlink()  # of a trial that was the best one for a while
    return commands


def experiment_commands(plan: Plan, numbers: list[int]) -> list[str]:
    """The commands that run trials of the best ones again."""
    folder = shlex.quote(str(plan.folder / "conf"))
    names = [experiment_name(plan, number, len(plan.settings.metrics)) for number in numbers]
    return [f"deepspeed launch/train.py +exp={name} --config-dir {folder}" for name in names]


def experiment_name(plan: Plan, number: int, num_metrics: int) -> str:
    """<sweep>; of a Pareto set <sweep>-<trial>."""
    return plan.study_name if num_metrics == 1 else f"{plan.study_name}-{number}"


def show_table(result: Result, console: Console | None = None) -> None:
    """The trials, best first."""
    keys = list(dict.fromkeys(key for row in result.rows for key in row.params))
    last_words = [key.rsplit(".", 1)[-1] for key in keys]
    short = [word if last_words.count(word) == 1 else key for key, word in zip(keys, last_words, strict=True)]
    table = Table(title=f"{result.name}: {', '.join(f'{n} {s}' for s, n in result.counts().items())}")
    for name in ("trial", "status", *result.metrics, *short, "time"):
        table.add_column(name, overflow="fold")
    for row in sorted(result.rows, key=lambda row: _order(result, row)):
        values: list[float | None] = [*row.values] if row.values else [None] * len(result.metrics)
        cells = [str(row.number), row.status]
        cells += [figure(name, value) for name, value in zip(result.metrics, values, strict=True)]
        cells += [_param(row.params.get(key)) for key in keys]
        style = "bold green" if row.number in result.best else "red" if row.status == "failed" else None
        cells.append(duration(row.seconds))
        table.add_row(*[Text(cell) for cell in cells], style=style)
    (console or Console()).print(table)


def _order(result: Result, row: Row) -> tuple[bool, float, int]:
    sign = 1.0 if result.directions[0] == "minimize" else -1.0
    return row.values is None, sign * row.values[0] if row.values else 0.0, row.number


def _param(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
