"""The processes of one training, from the launcher to the last rank, and how they ended.

The supervisor is the subreaper of its trainings (prctl(2)): whatever a training leaves behind, in whatever session,
becomes its child, and none is left when the next one starts.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tunesmith.train.errors import EXIT_MISTAKE, EXIT_STOPPED
from tunesmith.train.ranks.launchers import launcher_of
from tunesmith.train.ranks.stop import ENDS, LAUNCHER_GONE

PR_SET_CHILD_SUBREAPER = 36
SAVE_SECONDS = 600.0  # for ranks that have lost their launcher to save and end
KILL_SECONDS = 10.0  # between SIGTERM and SIGKILL for what is left then


@dataclass(frozen=True)
class TrainingExit:
    """How a training ended: the launcher's exit code, and what each rank left in the folder of ENDS."""

    code: int
    ranks: dict[int, str]  # rank: "75 SIGTERM", "2 <cause>", "0"; or RUNNING when it was killed or raised
    orphaned: bool = False  # ranks were still running when the launcher had ended

    @property
    def mistake(self) -> bool:
        return self.code == EXIT_MISTAKE or any(said.split()[:1] == [str(EXIT_MISTAKE)] for said in self.ranks.values())

    @property
    def finished(self) -> bool:
        return self.ranks.get(0, "") == "0"

    @property
    def was_stopped(self) -> bool:
        """Somebody asked it to. A launcher that has gone is no such request, nor is its SIGTERM when a rank died."""
        if self.orphaned or self.code < 0:
            return False
        if not self.ranks:
            return self.code == EXIT_STOPPED
        said = self.ranks.values()
        return all(one.startswith(f"{EXIT_STOPPED} ") and LAUNCHER_GONE not in one for one in said)

    @property
    def has_obeyed(self) -> bool:
        """Whether a training that was asked to stop did so, and no rank died of something else in the meantime."""
        if not self.ranks:  # on other machines, or the signal came before the first one
            return self.code == EXIT_STOPPED or self.code < 0
        return all(said.split()[:1] == [str(EXIT_STOPPED)] for said in self.ranks.values())

    @property
    def how(self) -> str:
        if self.code < 0:
            return f"its launcher was ended by {signal.Signals(-self.code).name}"
        if self.orphaned or any(LAUNCHER_GONE in said for said in self.ranks.values()):
            return "a launcher of its ranks was ended; they were told to save"
        return f"exit code {self.code}"


class TrainingProcess:
    """A running training."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._script = next(part for part in command if Path(part).name == "train.py")
        self._ends = Path(tempfile.mkdtemp(prefix="tunesmith-ends-"))
        # A session of its own: a Ctrl-C reaches us alone, and deepspeed's processes would each kill what is below them.
        self._launcher = subprocess.Popen(
            list(command), env=os.environ | dict(environment) | {ENDS: str(self._ends)}, start_new_session=True
        )

    def pass_on(self, number: signal.Signals) -> None:
        """A signal for each rank; for the launcher, where there is no rank yet and so nothing to save."""
        ranks = [process for process in _descendants() if self._is_rank(process)]
        for process in ranks or [psutil.Process(self._launcher.pid)] if self._launcher.poll() is None else ranks:
            _signal(process, number)

    def wait(self) -> TrainingExit:
        """Returns when none of its processes is left."""
        code = self._launcher.wait()
        left = [process for process in _descendants() if self._is_rank(process)]
        for process in left:  # most have noticed that the launcher is gone; a rank that waits for others has not
            _signal(process, signal.SIGTERM)
        psutil.wait_procs(left, timeout=SAVE_SECONDS)
        _end_all()
        ranks = {
            int(path.name.removeprefix("rank-")): path.read_text(encoding="utf-8") for path in self._ends.glob("rank-*")
        }
        shutil.rmtree(self._ends, ignore_errors=True)
        return TrainingExit(code, ranks, orphaned=bool(left))

    def _is_rank(self, process: psutil.Process) -> bool:
        """Runs the training script, and is neither a launcher with it among its arguments nor a rank's own child."""
        try:
            own, above = process.cmdline(), process.parent()
            if self._script not in own or launcher_of(own):
                return False
            command = above.cmdline() if above is not None else []
            return self._script not in command or launcher_of(command) is not None
        except psutil.Error:
            return False


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _end_all() -> None:
    """Ends what a training has left: helpers of W&B, ranks that do not answer. They may start more while they end."""
    deadline = time.monotonic() + 2 * KILL_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        left = _descendants()
        for process in left:
            _signal(process, number)
        if not psutil.wait_procs(left, timeout=KILL_SECONDS)[1] and not _descendants():
            return
        if time.monotonic() > deadline:
            return
