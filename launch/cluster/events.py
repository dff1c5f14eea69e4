"""What a job records about itself: <run>/job/events.jsonl, a line for each start, sick node and end."""

import os
import time
from pathlib import Path
from typing import Any

import orjson

from tunesmith.launch.cluster.figures import count, moment
from tunesmith.launch.cluster.log_file import tail_rows
from tunesmith.train.config.schema.cluster import NODE_LIST

NAME = "events.jsonl"
SICK_HOURS = 24.0  # that a node stays excluded; by then somebody has looked after it


def append(folder: Path, restart: int, event: str, **values: Any) -> None:
    """One line, in one write. A full disk must not end a job: the line is then missing."""
    row = {"time": time.time(), "restart": restart, "event": event, **values}
    try:
        file = os.open(folder / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return
    try:
        os.write(file, orjson.dumps(row) + b"\n")
    except OSError:
        return
    finally:
        os.close(file)


def events_of(folder: Path) -> list[dict[str, Any]]:
    """The last rows, oldest first."""
    return [row for row in tail_rows(folder / NAME) if isinstance(row.get("event"), str)]


def sick_nodes(folder: Path) -> dict[str, str]:
    """Nodes that were found to be sick within SICK_HOURS: node -> why."""
    since = time.time() - 3600 * SICK_HOURS
    rows = [row for row in events_of(folder) if row["event"] == "sick" and NODE_LIST.fullmatch(str(row.get("node")))]
    recent = [row for row in rows if (when := moment(row.get("time"))) is not None and when >= since]
    return {str(row["node"]): str(row.get("reason", "")) for row in recent}


def restarts_without_progress(rows: list[dict[str, Any]]) -> int:
    """How many of a job's last ends, in a row, came without a newer checkpoint than the ends before."""
    steps = [step for row in rows if row["event"] == "ended" and (step := count(row.get("step"))) is not None]
    in_vain = 0
    for number, step in enumerate(steps):
        in_vain = 0 if step > max(steps[:number], default=0) else in_vain + 1
    return in_vain
