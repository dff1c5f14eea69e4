"""Files that are on the disk, whole, once the call has returned.

Everything a checkpoint does to the file system goes through here, one operation() at a time, so that a test can count
the operations of a save and end a rank at any of them (fault_plan.py).
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunesmith.train.ranks.progress import progress

BUFFER_BYTES = 1 << 20  # torch.save writes a header and padding for each tensor; larger writes go past the buffer
COMMITS = ("rename", "mkdir", "unlink")  # what only the newest attempt at a run may do (fence.py)
HIDDEN_PREFIX = ".tunesmith-"  # start of the names that make no run folder look used (run_folder.py)
FILE_MODE, FOLDER_MODE = 0o644, 0o755  # whatever the umask allows: a checkpoint that others may write is refused later
before_commit: list[Callable[[], None]] = []  # fence.check(), in a process that knows of a fence


@dataclass(frozen=True)
class FileDigest:
    """What a file must be: its size in bytes, and its SHA-256 in hex."""

    size: int
    sha256: str


def operation(kind: str, path: Path) -> None:
    """Stands before every change to the disk. Kinds: open, write, fsync, rename, mkdir, unlink.

    Raises Superseded for one of COMMITS when a newer attempt has the run folder.
    """
    if kind in COMMITS:
        check_commit()
    if progress.plan is not None:
        progress.plan.at_file(kind, str(path))


def check_commit() -> None:
    """Raises Superseded when a newer attempt has the run folder."""
    for check in before_commit:
        check()


def save_begins() -> None:
    """The operations that follow are those of the next save, until save_ends()."""
    if progress.plan is not None:
        progress.plan.save_begins()


def save_ends() -> None:
    if progress.plan is not None:
        progress.plan.save_ends()


class HashingFile(io.RawIOBase):
    """A new file that hashes what is written to it. An error is kept for finish(): torch.save does not survive one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        operation("open", path)
        self._path = path
        self._descriptor = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE
        )
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: "memoryview | bytes", /) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._write(view)
            except OSError as error:
                error.filename = str(self._path)
                self._error = error
        return len(view)

    def _write(self, view: memoryview) -> None:
        operation("write", self._path)
        done = 0
        while done < len(view):
            done += os.write(self._descriptor, view[done:])
        self._sha256.update(view)
        self._size += len(view)

    def finish(self) -> FileDigest:
        """Makes sure of the disk. Raises the OSError that a write has met."""
        if self._error is not None:
            raise self._error
        operation("fsync", self._path)
        os.fsync(self._descriptor)
        return FileDigest(self._size, self._sha256.hexdigest())

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> FileDigest:
    """A new file, filled by `write(file)`. Raises OSError."""
    raw = HashingFile(path)
    with io.BufferedWriter(raw, BUFFER_BYTES) as file:  # type: ignore[type-var]
        write(file)
        file.flush()
        return raw.finish()


def write_bytes(path: Path, data: bytes) -> FileDigest:
    return write_file(path, lambda file: file.write(data))


def write_atomically(path: Path, content: bytes) -> None:
    """A file that is the old one or the new one at any moment. Raises OSError, and Superseded (fence.py)."""
    check_commit()  # nothing is left behind by an attempt that has lost the folder
    staged = path.with_name(f"{HIDDEN_PREFIX}{path.name}.staged")
    write_bytes(staged, content)
    replace(staged, path)


def write_json(path: Path, tree: object) -> None:
    write_atomically(path, json_bytes(tree))


def json_bytes(tree: object) -> bytes:
    """The one way a tree is spelled: the same tree gives the same bytes."""
    return (json.dumps(tree, indent=2, sort_keys=True, allow_nan=True) + "\n").encode()


def replace(source: Path, target: Path) -> None:
    """Renames, over a file that is there, and makes sure of both names."""
    operation("rename", target)
    os.replace(source, target)
    sync_folder(target.parent)


def make_folder(path: Path) -> None:
    """A folder and those above it, where they are not there yet."""
    if path.is_dir():
        return
    make_folder(path.parent)
    operation("mkdir", path)
    path.mkdir(FOLDER_MODE, exist_ok=True)


def sync_folder(path: Path) -> None:
    """Makes sure of the names in a folder."""
    operation("fsync", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> FileDigest:
    """Makes sure of a file that somebody else has written, and digests it."""
    operation("fsync", path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return digest_of(path)


def digest_of(path: Path) -> FileDigest:
    """Reads a whole file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(file.tell(), sha256)


def remove_tree(path: Path) -> None:
    """Removes a folder with what is in it, as far as it can be: what stays is removed at the next start."""
    for folder, folders, files in os.walk(path, topdown=False):
        for name in files + [name for name in folders if Path(folder, name).is_symlink()]:
            operation("unlink", Path(folder, name))
            with contextlib.suppress(OSError):
                os.unlink(Path(folder, name))
        with contextlib.suppress(OSError):
            os.rmdir(folder)
