"""What a run that failed leaves behind and says: one cause line, failure.json, the status in summary.json, stacks."""

import contextlib
import faulthandler
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tunesmith.train.files.durable import write_json
from tunesmith.train.files.fence import Superseded, fence
from tunesmith.train.files.run_folder import SUMMARY
from tunesmith.train.redact import on_screen, redact_text
from tunesmith.train.watch.cause import Cause, process_state
from tunesmith.train.watch.rank_status import RankStatus

FAILURE = "failure.json"
STACKS = "stacks"
DUMP_SECONDS = 0.5  # for a process to write its stacks: microseconds of work, on a busy machine
LOST_PEER = (  # what gloo, NCCL and the store say on the ranks that did nothing wrong
    "gloo",
    "NCCL",
    "ncclSystemError",
    "ncclRemoteError",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "failed to recv",
)


@dataclass(frozen=True)
class RunFiles:
    """Where a failing run writes: its folder, once it is this run's own, and its name."""

    folder: Path
    name: str


def say(text: str) -> None:
    """To stderr, without secrets, past Python's own buffer, whose lock a hanging thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, on_screen(text).encode(errors="replace"))


def traceback_of(error: BaseException) -> str:
    """The traceback as Python prints it, without secrets."""
    return redact_text("".join(traceback.format_exception(error)))


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or the one behind it, is what a rank gets when another one is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in LOST_PEER):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def write_failure(files: RunFiles | None, cause: Cause, world_size: int, trace: str, stacks: Path | None) -> None:
    """failure.json, and summary.json with the status; nothing where there is no run folder, or no room in it."""
    if files is None or is_superseded():
        return
    if (files.folder / FAILURE).exists():  # by another node, which could not tell this one, of the same attempt
        return
    line = redact_text(cause.line)
    tree = {
        "rank": cause.rank,
        "world_size": world_size,
        "step": cause.step,
        "phase": cause.phase,
        "kind": cause.kind,
        "cause": line,
        "traceback": trace or None,
        "stacks": str(stacks) if stacks else None,
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with contextlib.suppress(OSError):
        write_json(files.folder / FAILURE, tree)
        write_json(files.folder / SUMMARY, failed_summary(files.name, cause.step, line))


def is_superseded() -> bool:
    """Whether the run folder is a newer attempt's, which must not find our failure in it."""
    try:
        fence.check()
    except (Superseded, OSError):
        return True
    return False


def failed_summary(name: str, steps: int, line: str) -> dict[str, Any]:
    return {"status": "failed", "name": redact_text(name), "steps": steps, "error": line}


def forget_failure(folder: Path) -> None:
    """Takes away what an earlier attempt left in the run folder."""
    (folder / FAILURE).unlink(missing_ok=True)
    for file in (folder / STACKS).glob("rank-*.txt") if (folder / STACKS).is_dir() else ():
        file.unlink()


def register_stacks() -> IO[bytes]:
    """From now on SIGUSR2 writes the stacks of all threads into the memory file that is returned.

    By C code inside the signal handler, so also while another thread holds the interpreter's lock. Segfaults and the
    like say where they were on stderr.
    """
    file = os.fdopen(os.memfd_create("tunesmith-stacks"), "wb", buffering=0)
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    if not faulthandler.is_enabled():
        faulthandler.enable()
    return file


def collect_stacks(statuses: Iterable[RankStatus], files: RunFiles | None) -> Path | None:
    """Asks the ranks of this node for the stacks of their threads and writes them to files of their own."""
    statuses = list(statuses)
    for status in statuses:
        with contextlib.suppress(OSError):
            os.kill(status.pid, signal.SIGUSR2)
    time.sleep(DUMP_SECONDS)
    try:
        if files is None or is_superseded():
            folder = Path(tempfile.mkdtemp(prefix="tunesmith-stacks-"))
        else:
            folder = files.folder / STACKS
            folder.mkdir(exist_ok=True)
        for status in statuses:
            (folder / f"rank-{status.rank}.txt").write_bytes(_stacks_of(status))
    except OSError:
        return None
    return folder


def _stacks_of(status: RankStatus) -> bytes:
    title = f"rank {status.rank} (pid {status.pid}) {status.where}\n"
    try:
        written = Path(f"/proc/{status.pid}/fd/{status.stacks_fd}").read_bytes()
    except OSError as error:
        return f"{title}its stacks cannot be read: {error}\n".encode()
    if not written:
        stopped = process_state(status.pid) == "T"
        why = "it is stopped, and a stopped process runs nothing" if stopped else f"no answer in {DUMP_SECONDS} s"
        return f"{title}no stacks: {why}.\n".encode()
    return title.encode() + written
