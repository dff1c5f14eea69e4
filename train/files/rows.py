"""JSONL files with a row per step that survive a kill: read, cut back, rewritten whole.

They hold what records and models say, and people look at them with `cat`.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import orjson

from tunesmith.train.files.durable import write_atomically
from tunesmith.train.printable import printable


def finite(value: float | None) -> float | None:
    """The value as a plain number, or None where JSON has no number for it."""
    if value is None or isinstance(value, bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file. A torn line, as a killed run leaves, is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(orjson.JSONDecodeError):
            row = orjson.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(f"{printable(orjson.dumps(row).decode())}\n" for row in rows).encode())


def keep_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drops the rows after last_step, and torn ones, from a JSONL file; all of them when the run starts anew."""
    if not path.exists():
        return []
    rows = [row for row in read_rows(path) if last_step and row["step"] <= last_step]
    write_rows(path, rows)
    return rows
