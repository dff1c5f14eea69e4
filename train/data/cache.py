"""A folder that is built once for each key: by one process, whole or not at all, and checked when it is opened."""

import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import orjson
from filelock import FileLock, Timeout

from tunesmith.train.errors import DataError
from tunesmith.train.paths import user_path
from tunesmith.train.ranks.distributed import world_from_environment

MANIFEST = "manifest.json"
CHECKED_BYTES = 1 << 22  # at either end of a file: all of a small one, and no long wait for a large one
OWNER_ONLY = 0o700
HEAD_START_SECONDS = 10.0  # how long other ranks wait for local rank 0 to begin building


def cache_folder(cache_dir: str | None) -> Path:
    """Where prepared data is kept: cache_dir, else $XDG_CACHE_HOME/tunesmith, else ~/.cache/tunesmith."""
    if cache_dir is not None:
        return user_path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tunesmith"


def open_or_build(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of a key, built by `build(empty folder)` if it isn't there whole.

    Every rank may call this. Local rank 0 builds, the others wait for it; should it fail, each of them meets the same
    error. Raises: DataError when the folder can't be written, and whatever build raises.
    """
    folder = root / key
    if _is_whole(folder):
        return folder
    try:
        root.mkdir(OWNER_ONLY, parents=True, exist_ok=True)  # it holds what the records say
        lock = FileLock(root / f"{key}.lock")
        if world_from_environment().local_rank > 0:
            _wait_for_builder(folder, lock)
        with lock:
            if not _is_whole(folder):
                _build(root, folder, build)
    except OSError as error:
        raise DataError(
            f"the prepared data can't be written to {root}: {error.strerror or error}",
            at="data.cache_dir",
            do="set data.cache_dir to a folder with space that you may write to.",
        ) from error
    return folder


def _build(root: Path, folder: Path, build: Callable[[Path], None]) -> None:
    temporary = root / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had our number
    try:
        temporary.mkdir()
        build(temporary)
        _write_manifest(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_for_builder(folder: Path, lock: FileLock) -> None:
    """Returns when the folder is whole, when another process builds it, or when local rank 0 seems not to come."""
    deadline = time.monotonic() + HEAD_START_SECONDS
    while time.monotonic() < deadline and not _is_whole(folder):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return  # the builder holds it
        lock.release()
        time.sleep(0.05)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): _checksum(path) for path in files}
    (folder / MANIFEST).write_bytes(orjson.dumps(sums))


def _is_whole(folder: Path) -> bool:
    try:
        sums = orjson.loads((folder / MANIFEST).read_bytes())
        return all(_checksum(folder / name) == expected for name, expected in sums.items())
    except (OSError, orjson.JSONDecodeError, AttributeError):
        return False


def _checksum(path: Path) -> list[int]:
    """Size, and the CRC of the first and last CHECKED_BYTES."""
    size = path.stat().st_size
    with path.open("rb") as file:
        checksum = zlib.crc32(file.read(CHECKED_BYTES))
        if size > CHECKED_BYTES:
            file.seek(max(CHECKED_BYTES, size - CHECKED_BYTES))
            checksum = zlib.crc32(file.read(), checksum)
    return [size, checksum]
