"""The run folder: its name, whether it can be used and written, and who holds it."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunesmith.train.config.config import Config
from tunesmith.train.errors import ConfigError
from tunesmith.train.files import step_folders
from tunesmith.train.files.durable import HIDDEN_PREFIX, write_atomically
from tunesmith.train.files.fence import Token, supersedes
from tunesmith.train.paths import user_path

MODEL = "model"  # what the run leaves behind
CONFIG = "config.yaml"
SUMMARY = "summary.json"
JOB = "job"  # what launch/slurm.py puts there before the run has begun
SPARE_BYTES = 256 * 2**20  # for metrics, the report and W&B's files


def choose(config: Config) -> Path:
    """The run folder: output_dir, or runs/<name>-<date>-<time>. Only rank 0 may ask: a clock differs between ranks."""
    if config.output_dir:
        if not config.output_dir.isprintable():  # NUL ends a name for the system, a line break hides what follows
            raise ConfigError(
                f"{config.output_dir!r} cannot name a folder.", key="output_dir", do="use characters that can be seen."
            )
        return user_path(config.output_dir).absolute()
    return Path("runs", f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def best_folder(run_dir: Path, step: int) -> Path:
    """Where the best weights wait until the run has ended."""
    return run_dir / "best" / f"step-{step:06d}"


def check_usable(folder: Path, resume: str) -> None:
    """Raises ConfigError when the folder holds something else, or a run that must not be written over."""
    try:
        is_run = (folder / CONFIG).is_file()
        is_used = folder.is_dir() and any(not _says_nothing(path.name) for path in folder.iterdir())
    except OSError as error:  # too long a name, or no permission to look
        raise ConfigError(
            f"the run folder cannot be used: {error.strerror}.", at="output_dir", do="choose another output_dir."
        ) from None
    if is_used and not is_run:
        raise ConfigError(f"{folder} is not empty and holds no run.", at="output_dir", do="choose another output_dir.")
    if is_run and resume != "auto" and _has_results(folder):
        raise ConfigError(
            f"{folder} already holds a run.",
            at="output_dir",
            do="choose another output_dir, or go on with resume.source=auto.",
        )
    check_links(folder)
    check_writable(folder)


def _says_nothing(name: str) -> bool:
    return name.startswith(HIDDEN_PREFIX) or name == JOB


def _has_results(folder: Path) -> bool:
    """Whether a run has left more than its first minutes: one that died before its first save may start once more."""
    saved = [path for path in (folder / step_folders.FOLDER).glob("step-*") if ".tmp-" not in path.name]
    return bool(saved) or (folder / MODEL).exists()


def check_links(folder: Path) -> None:
    """Raises ConfigError for a link in the folder that leads out of it: what is written or pruned would lie elsewhere.

    The folder itself may be a link, and so may its parents: the user has named it. W&B's links lead to its own files,
    but for one in the folder of each of its runs, which nothing opens again: wandb 0.31 keeps that log in its cache.
    """
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in [*folders, *files]):
            if path.is_symlink() and not path.resolve().is_relative_to(inside) and not _is_wandb_log(path, folder):
                raise ConfigError(
                    f"{path.relative_to(folder)} in the run folder is a link to {os.readlink(path)}, outside of it.",
                    at=f"output_dir ({folder})",
                    do="remove the link, or choose another output_dir.",
                )


def _is_wandb_log(path: Path, folder: Path) -> bool:
    """<run>/wandb/<run of W&B>/logs/debug-core.log"""
    parts = path.relative_to(folder).parts
    return len(parts) == 4 and (parts[0], *parts[2:]) == ("wandb", "logs", "debug-core.log")


def create(folder: Path, config_yaml: str, held: FileLock | None = None) -> FileLock:
    """Makes the folder with the resolved config in it; rank 0 only. The lock is the run's until its process ends.

    held: the lock, where the folder was there before and is held already. Raises ConfigError when another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder)
    lock = held or hold(folder)
    write_atomically(folder / CONFIG, config_yaml.encode())
    return lock


def hold(folder: Path, token: Token | None = None) -> FileLock:
    """The lock of a folder that is there. Raises ConfigError when another run holds it.

    token: of this attempt. An earlier attempt of the same job may still run on a node that is cut off, with the lock:
    its lock file is removed, and the fence keeps it from writing.
    """
    path = folder / f"{HIDDEN_PREFIX}lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:  # a file system without flock, as Lustre may be mounted: the fence is what is left
        return lock
    except Timeout:
        if token is not None and supersedes(token, folder):
            path.unlink(missing_ok=True)
            return hold(folder)
        raise ConfigError(
            f"another run is writing to {folder}.",
            at="output_dir",
            do="wait for its end, or choose another output_dir.",
        ) from None
    return lock


def is_finished(folder: Path) -> bool:
    """True when the folder holds a run that has come to its end, with its model."""
    return finished_summary(folder) is not None


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """What a run that has come to its end, with its model, wrote in summary.json; None where there is none."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        has_ended = summary["status"] == "finished" and (folder / MODEL).is_dir()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return summary if has_ended else None


def check_writable(folder: Path, needed_bytes: int = SPARE_BYTES) -> None:
    """Raises ConfigError when the folder cannot be made or its disk has less than needed_bytes free. Leaves nothing."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"{parent} is a file.", at="output_dir", do="choose another output_dir.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=HIDDEN_PREFIX, dir=parent))
    except OSError as error:
        raise ConfigError(
            f"the run folder cannot be made in {parent}: {error.strerror}.",
            at="output_dir",
            do="choose another output_dir.",
        ) from None
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ConfigError(
            f"the run needs about {needed_bytes / 2**30:.2g} GiB of disk, and {free / 2**30:.2g} GiB are free.",
            at=f"output_dir ({parent})",
            do="free space, choose another output_dir, or keep fewer checkpoints (checkpoint.keep_last).",
        )
