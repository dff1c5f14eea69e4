"""Where a run is: from its own files, and from SLURM's queue where it has a job there.

python launch/slurm.py status <run>          a few lines
python launch/slurm.py status --json <run>   the same as JSON: times in unix seconds, null for what is not known
"""

import contextlib
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import yaml

from tunesmith.launch.arguments import run_argument, show_help
from tunesmith.launch.cluster.figures import count, figure, moment, seconds
from tunesmith.launch.cluster.job_folder import JobFolder, find_job, run_folder_of
from tunesmith.launch.cluster.log_file import tail_rows
from tunesmith.launch.cluster.queue import job_facts
from tunesmith.train.config import yaml_text
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.files import manifest
from tunesmith.train.files.run_folder import SUMMARY
from tunesmith.train.files.step_folders import newest_checkpoint, step_folder
from tunesmith.train.printable import printable
from tunesmith.train.redact import on_screen
from tunesmith.train.track.console import duration

USAGE = "write: python launch/slurm.py status [--json] <run>"
NUM_CAUSES = 5  # the last ends of the job that are shown
WINDOW = 20  # steps whose median time says how long the rest will take

Tree = dict[str, Any]


def status(arguments: list[str]) -> None:
    """Prints the status. Raises ConfigError for a folder that is not a run's."""
    if show_help(arguments, __doc__):
        return
    names = [argument for argument in arguments if argument != "--json"]
    found = status_of(run_folder_of(run_argument(names, USAGE)))
    if "--json" in arguments:
        sys.stdout.write(printable(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode()) + "\n")
        return
    rows = words(found)
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name:{width}}  {on_screen(text)}\n" for name, text in rows))


def status_of(run: Path) -> Tree:
    """What is known of a run. Raises ConfigError for a damaged job.json."""
    job = find_job(run)
    summary = _tree(run / SUMMARY)
    return {
        "run": str(run),
        "job": _job(job) if job else None,
        "progress": _progress(run),
        "checkpoint": _checkpoint(run),
        "summary": {name: summary.get(name) for name in ("status", "steps", "error", "reason")} if summary else None,
    }


def _job(job: JobFolder) -> Tree:
    """The job, in the queue and as its own events tell it."""
    facts, problem = None, None
    try:
        facts = job_facts(job.job_id)
    except (TrainingError, ConfigError) as error:  # the run's files tell the rest
        problem = error.what
    events = job.events()
    ends = [event for event in events if event["event"] == "ended"]
    sick = [event for event in events if event["event"] == "sick"]
    own = job.own_events()
    restarts = [number for event in own if (number := count(event.get("restart"))) is not None]
    return {
        "id": job.job_id,
        "submitted": job.submitted,
        "queue": facts.as_dict() if facts else None,
        "queue_problem": problem,
        "restart": max([*restarts, facts.restarts if facts else 0]),
        "max_restarts": job.max_restarts if job.max_restarts is not None else _max_restarts(job.run),
        "then": next((event.get("then") for event in reversed(own) if event["event"] == "ended"), None),
        "was_cancelled": job.stop_file.exists(),
        "has_ended": job.has_ended() or (facts.is_over if facts else problem is None),
        "ends": [_row(event, "cause", "then") | {"restart": count(event.get("restart"))} for event in ends],
        "sick": [_row(event, "node", "reason") for event in sick],
    }


def _row(event: Tree, *names: str) -> Tree:
    return {"time": moment(event.get("time")), **{name: event.get(name) for name in names}}


def _max_restarts(run: Path) -> int | None:
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        most = yaml_text.tree_of(yaml_text.read_text(run / "config.yaml"))["cluster"]["max_restarts"]
        return count(most)
    return None


def _progress(run: Path) -> Tree:
    """The newest steps in metrics.jsonl; times in seconds."""
    rows = [
        row for row in tail_rows(run / "metrics.jsonl") if "train/loss" in row and count(row.get("step")) is not None
    ]
    last = rows[-1] if rows else {}
    times = [known for row in rows[-WINDOW:] if (known := seconds(row.get("throughput/step_seconds"))) is not None]
    step, total = last.get("step"), count(_tree(run / "plan.json").get("total_steps"))
    step_seconds = median(times) if times else None
    left = None
    if step is not None and total is not None and step_seconds is not None:
        left = max(0, total - step) * step_seconds  # without evaluations and saves
    return {
        "step": step,
        "total_steps": total,
        "loss": figure(last.get("train/loss")),
        "tokens_per_second": figure(last.get("throughput/tokens_per_second")),
        "step_seconds": step_seconds,
        "seconds_left": left,
        "seconds_since": time.time() - (run / "metrics.jsonl").stat().st_mtime if rows else None,
    }


def _checkpoint(run: Path) -> Tree | None:
    """The newest checkpoint that was written completely."""
    step = newest_checkpoint(run)
    if not step:
        return None
    path = step_folder(run, step)
    with contextlib.suppress(OSError):  # it may be pruned meanwhile
        return {"step": step, "path": str(path), "time": (path / manifest.NAME).stat().st_mtime}
    return None


def _tree(path: Path) -> Tree:
    """A small JSON file; empty without it."""
    with contextlib.suppress(OSError, orjson.JSONDecodeError):
        tree = orjson.loads(path.read_bytes())
        return tree if isinstance(tree, dict) else {}
    return {}


def words(found: Tree) -> list[tuple[str, str]]:
    """The tree of status_of() as rows for a person."""
    rows = [("run", found["run"]), *_job_words(found)]
    progress, checkpoint = found["progress"], found["checkpoint"]
    if progress["step"] is None:
        rows.append(("step", "none yet"))
    else:
        rows += _progress_words(progress, over=_is_over(found))
    if checkpoint:
        rows.append(("checkpoint", f"step {checkpoint['step']}, {duration(time.time() - checkpoint['time'])} ago"))
    else:
        rows.append(("checkpoint", "none yet"))
    return rows + _cause_words(found)


def _is_over(found: Tree) -> bool:
    return found["job"]["has_ended"] if found["job"] else found["summary"] is not None


def _job_words(found: Tree) -> list[tuple[str, str]]:
    job, summary = found["job"], found["summary"]
    if job is None:
        state = summary["status"] if summary else "under way, or killed"
        return [("job", "none: it was not submitted by launch/slurm.py"), ("state", state)]
    most = "" if job["max_restarts"] is None else f" of at most {job['max_restarts']}"
    rows = [("job", f"{job['id']}, restart {job['restart']}{most}"), ("state", _state_words(job, summary))]
    queue = job["queue"]
    if queue and queue["nodes"] and not job["has_ended"]:
        rows.append(("nodes", queue["nodes"]))
    if queue and queue["seconds_left"] is not None:
        rows.append(("time", f"{duration(max(0, queue['seconds_left']))} left of the job's"))
    return rows


def _state_words(job: Tree, summary: Tree | None) -> str:
    """In SLURM's words where its queue knows the job; what became of the run, once the job has ended."""
    queue, after = job["queue"], ""
    if job["has_ended"]:
        became = summary["status"] if summary else job["then"]
        after = f"; the run: {became}" if became else ""
    elif job["was_cancelled"]:
        after = ", cancelled"
    if job["queue_problem"]:
        return f"not known: {job['queue_problem']}{after}"
    if queue is None:
        return f"no longer in the queue{after}"
    reason = f" ({queue['reason']})" if queue["reason"] else ""
    start = queue["start_time"] if queue["state"] == "PENDING" else None
    when = f", may start {time.strftime('%F %T', time.localtime(start))}" if start else ""
    return f"{queue['state']}{reason}{when}{after}"


def _progress_words(progress: Tree, *, over: bool) -> list[tuple[str, str]]:
    total, left = progress["total_steps"], progress["seconds_left"]
    of = f" of {total:,} ({progress['step'] / total:.0%})" if total else ""
    rows = [("step", f"{progress['step']:,}{of}, {duration(max(0, progress['seconds_since']))} ago")]
    if progress["loss"] is not None:
        rows.append(("loss", f"{progress['loss']:.4f}"))
    if progress["tokens_per_second"] is not None:
        rows.append(("tokens/s", f"{progress['tokens_per_second']:,.0f}"))
    if left is not None and not over:
        rows.append(("left", f"{duration(left)} of training at {progress['step_seconds']:.3g} s a step"))
    return rows


def _cause_words(found: Tree) -> list[tuple[str, str]]:
    job, summary = found["job"], found["summary"]
    if job is None:
        return [("cause", str(summary["error"]))] if summary and summary["error"] else []
    rows = [("sick", f"{one['node']}: {one['reason']}") for one in job["sick"][-NUM_CAUSES:]]
    for end in job["ends"][-NUM_CAUSES:]:
        when = time.strftime("%F %T", time.localtime(end["time"])) if end["time"] else ""
        rows.append(
            (f"restart {end['restart']}" if end["restart"] else "start", f"{when} {end['cause']}: {end['then']}")
        )
    return rows
