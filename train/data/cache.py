"""A folder that is built once for each key: by one process, whole or not at all, and checked at every start.

    <key>/                   what was built, with the checksums of all its bytes
    <key>.lock               held by who builds it, on whatever host shares the cache
    .<key>.<boot>.<pid>.tmp  what a builder has not finished yet
    .<name>.<boot>.start     held by the rank of a host that checks or builds; in it, what that rank has found

The last lies in a private folder where the cache may only be read.
A boot is a host, as long as it runs: no two hosts share one, as they may share a name.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import orjson
from filelock import FileLock, Timeout

from tunesmith.train.data import block_sums
from tunesmith.train.errors import DataError
from tunesmith.train.paths import user_path
from tunesmith.train.ranks.distributed import world_from_environment

MANIFEST = "manifest.json"
OWNER_ONLY = 0o700
HEAD_START_SECONDS = 10.0  # how long other ranks wait for local rank 0 to begin
FOREIGN_DAYS = 2.0  # after which a folder that another host has not finished is taken for left behind

_taken: dict[Path, float] = {}  # what this process has last believed of each start: it is not believed again
Build = Callable[[Path], None]  # fills an empty folder
Progress = Callable[[int], AbstractContextManager[Callable[[int], Any]]]  # of so many bytes


def no_progress(total: int) -> AbstractContextManager[Callable[[int], Any]]:
    return nullcontext(lambda count: None)


def cache_folder(cache_dir: str | None) -> Path:
    """Where prepared data is kept: cache_dir, else $XDG_CACHE_HOME/tunesmith, else ~/.cache/tunesmith."""
    if cache_dir is not None:
        return user_path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tunesmith"


def open_or_build(
    root: Path, name: str, plan: Callable[[], tuple[str, Build]], progress: Progress = no_progress
) -> Path:
    """The folder of a key, checked, and built where it isn't there whole.

    Every rank may call this. Local rank 0 does the work, the others of its host wait and take what it has found;
    should it fail, each of them meets the same error.

    Args:
        name: the same on all ranks of a start: of what is to be prepared, as far as it is known without any work.
        plan: finds out the key, and how to build its folder.
    Raises: DataError when the folder can't be written, and whatever plan or the build raises.
    """
    try:
        root.mkdir(OWNER_ONLY, parents=True, exist_ok=True)  # it holds what the records say
        path = _start_path(root, name)
        if path is None:
            return _checked(root, *plan(), progress)
        since = _now()
        if world_from_environment().local_rank > 0:
            since = max(_process_start(), _taken.get(path, 0.0))
            _wait_for_first_rank(path, since)
        with path.open("a+b") as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            key = _found(start, since)
            if not key:
                _say(start, "")
                _remove_leftovers(path.parent)
                key = _checked(root, *plan(), progress).name
                _say(start, key)
            _taken[path] = _now()
            return root / key
    except OSError as error:
        raise DataError(
            f"the prepared data can't be written to {root}: {error.strerror or error}",
            at="data.cache_dir",
            do="set data.cache_dir to a folder with space that you may write to.",
        ) from error


def _start_path(root: Path, name: str) -> Path | None:
    """Where the ranks of this host tell each other what they have found. None: nowhere that only they may write."""
    if os.access(root, os.W_OK):
        return root / f".{name}.{_boot()}.start"
    name = hashlib.sha256(os.fsencode(root.resolve() / name)).hexdigest()  # a cache that another has filled
    for parent in filter(None, (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir())):
        folder = Path(parent) / f"tunesmith-{os.getuid()}"
        with suppress(OSError):
            folder.mkdir(OWNER_ONLY, exist_ok=True)
            found = folder.lstat()  # another may have made it, or a link, to make us believe in what isn't whole
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return folder / f".{name}.{_boot()}.start"
    return None


def _checked(root: Path, key: str, build: Build, progress: Progress) -> Path:
    folder = root / key
    if not _is_whole(folder, progress):
        with FileLock(root / f"{key}.lock"):
            if not _is_whole(folder, progress):  # nor has another host built it meanwhile
                _build(root, folder, build)
    return folder


def _build(root: Path, folder: Path, build: Build) -> None:
    temporary = root / f".{folder.name}.{_boot()}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had our number
    try:
        temporary.mkdir()
        build(temporary)
        (temporary / MANIFEST).write_bytes(orjson.dumps(block_sums.sums_of(temporary)))
        shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path, progress: Progress) -> bool:
    """Whether every byte is as it was written."""
    try:
        sums = orjson.loads((folder / MANIFEST).read_bytes())
        with progress(block_sums.num_bytes(sums)) as advance:
            return block_sums.agree(folder, sums, advance)
    except (OSError, ValueError, TypeError, AttributeError, LookupError):  # not there, or the manifest is damaged
        return False


def _remove_leftovers(root: Path) -> None:
    """What killed builders and hosts that are gone have left. A living builder holds the lock of its key.

    Some file systems show no host the locks of another: there a folder must also be old, and builders touch theirs.
    """
    for path in [*root.glob(".*.tmp"), *root.glob(".*.start")]:
        key, *owner = path.name.removeprefix(".").split(".")
        with suppress(OSError, Timeout):
            is_old = time.time() - path.stat().st_mtime > FOREIGN_DAYS * 86400
            if path.suffix == ".start" and is_old:
                path.unlink()
            elif path.suffix == ".tmp" and (is_old or _boot() in owner):
                with FileLock(root / f"{key}.lock").acquire(blocking=False):
                    shutil.rmtree(path)


def _wait_for_first_rank(path: Path, since: float) -> None:
    """Returns when local rank 0 has begun, or seems not to come."""
    deadline = time.monotonic() + HEAD_START_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError), path.open("rb") as start:
            if _found(start, since) is not None:
                return
        time.sleep(0.05)


def _say(start: IO[bytes], key: str) -> None:
    start.truncate(0)
    start.write(orjson.dumps([key, _now()]))
    start.flush()


def _found(start: IO[bytes], since: float) -> str | None:
    """The key of the folder that a rank has found or made whole; empty while it is at work; None: none has begun."""
    start.seek(0)
    try:
        key, moment = orjson.loads(start.read())
        return str(key) if moment > since else None
    except (ValueError, TypeError):  # nothing written yet
        return None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _now() -> float:
    """Seconds since the host was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _process_start() -> float:
    """When this process was started, by the same clock."""
    after_name = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
