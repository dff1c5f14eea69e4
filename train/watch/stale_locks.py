"""Locks that a killed build of a C++ extension left behind: torch waits for them for ever, without a word.

torch and DeepSpeed build extensions under TORCH_EXTENSIONS_DIR behind a file `lock` that says nothing of its owner
(torch.utils.file_baton). Its owner keeps it open, though, so on a disk of this machine a lock that no process has open
is nobody's.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from tunesmith.train.errors import TrainingError

WAIT_SECONDS = 20.0  # for a build on another machine, which cannot be seen from here, to end
# Of other machines too; so is everything under FUSE, for all we know.
SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "panfs", "wekafs", "afs", "9p", "fuse")


def extensions_folder() -> Path:
    """Where torch builds extensions."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"


def clear_stale_locks(folder: Path, warn: Callable[[str], None]) -> None:
    """Removes locks that nobody holds. Raises TrainingError for one that may be another machine's and does not go."""
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        if not lock.is_file() or is_open(lock):
            continue
        if file_system(lock).startswith(SHARED):
            _wait_for(lock)
        else:
            lock.unlink(missing_ok=True)
            warn(f"removed {lock}, left behind by a build that was killed.")


def is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open, or one that we may not look into has the same owner."""
    found = path.stat()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            handles = list(os.scandir(process / "fd"))
        except OSError:  # it has ended, or is another user's: who could not have made this file, unless it is theirs
            continue
        for handle in handles:
            try:
                opened = os.stat(handle.path)
            except OSError:
                continue
            if (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino):
                return True
    return found.st_uid != os.getuid()


def file_system(path: Path) -> str:
    """The kind of file system a file is on, as mount names it; empty when the system does not say."""
    whole = str(path.resolve())
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in mounts:
        point = line.split()[1].replace("\\040", " ")
        if (whole == point or whole.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, line.split()[2]
    return kind


def _wait_for(lock: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while lock.exists():
        if time.monotonic() > deadline:
            raise TrainingError(
                "an extension is being built on another machine, or a build was killed there and left its lock.",
                at=str(lock),
                do="if nothing is building, remove this file; TORCH_EXTENSIONS_DIR on a local disk avoids it.",
            )
        time.sleep(0.2)
