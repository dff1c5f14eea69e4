"""This rank's files of a checkpoint under way, written at once or by a thread while training goes on."""

import queue
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from tunesmith.train.files import durable
from tunesmith.train.files.durable import FileDigest

Write = Callable[[BinaryIO], object]


def list_name(rank: int) -> str:
    """The file in which a rank lists what it has written; the last of them."""
    return f"rank-{rank:05d}.files.json"


class RankFiles:
    """The files of one rank, written in the order they are added.

    No call raises for the disk: a rank that left here would leave the others waiting for it. The first thing that goes
    wrong stands in `problem`, and nothing is written after it.
    """

    def __init__(self, folder: Path, rank: int, *, background: bool) -> None:
        self.folder = folder
        self.rank = rank
        self.background = background
        self.problem = ""
        self._written: dict[str, FileDigest] = {}
        self._waiting: queue.SimpleQueue[tuple[Path, Write] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
            self._thread.start()

    def add(self, path: Path, write: Write) -> None:
        """A file, filled by `write(file)`: later, in the background, so that what it writes must not change."""
        if self.background:
            self._waiting.put((path, write))
        else:
            self._write(path, write)

    def add_bytes(self, name: str, data: bytes) -> None:
        self.add(self.folder / name, lambda file: file.write(data))

    def add_folder(self, path: Path) -> None:
        self._careful(lambda: durable.make_folder(path))

    def add_written(self, path: Path) -> None:
        """A file that somebody else has written already, on behalf of this rank."""
        self._careful(lambda: self._note(path, durable.sync_file(path)))

    def fail(self, error: OSError) -> None:
        def again() -> None:
            raise error

        self._careful(again)

    def finish(self) -> None:
        """Nothing will be added. Writes the list of this rank's files, after them."""
        self.add(self.folder / list_name(self.rank), lambda file: file.write(self._listed()))
        if self.background:
            self._waiting.put(None)

    @property
    def unwritten(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _listed(self) -> bytes:
        return durable.json_bytes({name: asdict(digest) for name, digest in self._written.items()})

    def _work(self) -> None:
        while (task := self._waiting.get()) is not None:
            self._write(*task)

    def _write(self, path: Path, write: Write) -> None:
        self._careful(lambda: self._note(path, durable.write_file(path, write)))

    def _note(self, path: Path, digest: FileDigest) -> None:
        self._written[path.relative_to(self.folder).as_posix()] = digest

    def _careful(self, action: Callable[[], None]) -> None:
        if self.problem:
            return
        try:
            action()
        except OSError as error:
            self.problem = f"{error.strerror or error}: {Path(error.filename or self.folder).name}"
        except (RuntimeError, MemoryError) as error:  # what torch.save makes of a failed write or copy
            self.problem = str(error).splitlines()[0] if str(error) else type(error).__name__
