"""A log that others write to, read as whole lines or rows, in bounded memory however long it or a line of it is."""

import contextlib
import os
from pathlib import Path
from typing import Any

import orjson

BLOCK_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 16  # a longer one is shown in pieces
TAIL_BYTES = 1 << 18  # of a file with a row for each step: some hundreds of rows


class LogFile:
    """New lines of a file, each with a prefix.

    A line is shown once it is whole, so that those of files that are written at once do not run into each other. Of a
    line that overwrites itself, as progress bars do, the last state is shown. The file is opened for each read: on NFS
    that is when a client looks for what others have written.

    Args:
        path: the file; it may come later.
        prefix: before each line.
        last_lines: how many of those that are there already are shown; None: all.
    """

    def __init__(self, path: os.PathLike[str], prefix: str, *, last_lines: int | None = None) -> None:
        self._path = Path(path)
        self._prefix = prefix.encode()
        self._torn = b""  # the start of a line whose end has not come yet
        self._offset = 0 if last_lines is None else start_of_last_lines(self._path, last_lines)

    def read(self) -> bytes:
        """Whole lines, about BLOCK_BYTES of them at most; empty when there is nothing new. Raises OSError."""
        while True:
            block = self._read_block()
            if not block:
                return b""
            *lines, self._torn = (self._torn + block).split(b"\n")
            if len(self._torn) > MAX_LINE_BYTES:
                lines.append(self._torn)
                self._torn = b""
            if lines:
                return b"".join(map(self._shown, lines))

    def rest(self) -> bytes:
        """The line that was never finished, if there is one: nobody writes to the file any more."""
        torn, self._torn = self._torn, b""
        return self._shown(torn) if torn else b""

    def _read_block(self) -> bytes:
        try:
            with self._path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # written anew
                    self._offset, self._torn = 0, b""
                file.seek(self._offset)
                block = file.read(BLOCK_BYTES)
        except FileNotFoundError:
            return b""
        self._offset += len(block)
        return block

    def _shown(self, line: bytes) -> bytes:
        return self._prefix + line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"


def start_of_last_lines(path: Path, number: int) -> int:
    """Where the last lines of a file begin, in bytes; 0 where it has no more, or is not there. Raises OSError."""
    try:
        with path.open("rb", buffering=0) as file:
            return _search_back(file.fileno(), number)
    except FileNotFoundError:
        return 0


def _search_back(descriptor: int, number: int) -> int:
    """Reads blocks from the end to the line break before the last lines."""
    end = os.fstat(descriptor).st_size
    if number == 0 or end == 0:
        return end
    breaks = number + (os.pread(descriptor, 1, end - 1) == b"\n")  # the one at the very end ends the last line
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        block = os.pread(descriptor, end - start, start)
        found = block.count(b"\n")
        if found >= breaks:
            place = len(block)
            for _ in range(breaks):
                place = block.rindex(b"\n", 0, place)
            return start + place + 1
        breaks, end = breaks - found, start
    return 0


def tail_rows(path: Path, max_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The last rows of a JSONL file that may be long; none without it. Torn lines are passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes))
            lines = file.read(max_bytes).split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[1:] if size > max_bytes else lines:
        with contextlib.suppress(orjson.JSONDecodeError):
            row = orjson.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows
