"""Which attempt may write into a run folder: the newest one, and no other.

A node that is cut off from the network goes on with its ranks while SLURM starts the same job on other nodes. So an
attempt writes its token into the run folder before it looks for a checkpoint, and every process of it looks whether the
token is still there before each commit: a rename, a new folder, a model put in its place.

    new attempt   1. writes its token   2. renames what unfinished saves have left   3. chooses a checkpoint
    old attempt   a. makes a staged folder   b. looks at the token   c. renames the staged folder

If b comes after 1, the old attempt stops. If b comes before 1, then so does a, and 2 takes the staged folder away: c
fails, or was done before 2, and then the checkpoint is whole and seen in 3. So nothing is committed after 3.
"""

import json
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith.train.errors import TrainingError
from tunesmith.train.files import durable

FILE = ".tunesmith-attempt.json"  # a name that makes no folder look used (run_folder.py)
LOOK_SECONDS = 2.0  # between two looks at it while nothing is committed


class Superseded(TrainingError):
    """A newer attempt at the same run has taken its folder: this one must not write."""


@dataclass(frozen=True)
class Token:
    """One attempt at a run.

    Args:
        launch: what started it: the same for each restart of a SLURM job, a random one for any other start.
        restart: how often that job was started before.
    """

    launch: str
    restart: int = 0

    def __str__(self) -> str:
        return f"{self.launch}, restart {self.restart}" if self.restart else self.launch


def token_from_environment() -> Token:
    """Of this start: SLURM's job id and restart count where there is a job, else one that nobody else has."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return Token(f"start {secrets.token_hex(8)}")
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "slurm")
    return Token(f"job {job} of {cluster}", int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def token_in(folder: Path) -> Token | None:
    """The token in a run folder; None without one, or with one that cannot be understood. Raises OSError."""
    try:
        tree = json.loads((folder / FILE).read_bytes())
        return Token(str(tree["launch"]), int(tree["restart"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None


def supersedes(token: Token, folder: Path) -> bool:
    """Whether the attempt that has the folder is an earlier start of the same job."""
    there = token_in(folder)
    return there is not None and there.launch == token.launch and there.restart < token.restart


class Fence:
    """Of this process. Until it has a token, check() lets everything pass."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._token: Token | None = None

    def take(self, folder: Path, token: Token) -> None:
        """The folder is this attempt's from now on: for rank 0, and before it the driver of its job.

        Raises OSError, and Superseded when a later start of the same job has it.
        """
        there = token_in(folder)
        if there is not None and there.launch == token.launch and there.restart > token.restart:
            raise _superseded(there, token, folder)
        self.leave()
        if there != token:
            durable.write_atomically(folder / FILE, json.dumps(asdict(token)).encode())
        self.join(folder, token)

    def join(self, folder: Path, token: Token) -> None:
        """Another process of this attempt has taken the folder."""
        self._folder, self._token = folder, token

    def leave(self) -> None:
        """This process writes nothing more, or into another folder."""
        self._folder = self._token = None

    def check(self) -> None:
        """Raises Superseded when a newer attempt has the folder; OSError when that cannot be read."""
        if self._folder is None:
            return
        there = token_in(self._folder)
        if there is not None and there != self._token:
            raise _superseded(there, self._token, self._folder)

    def watch(self, on_lost: Callable[[Superseded], None]) -> None:
        """Looks every LOOK_SECONDS in a thread of its own, which a dead file system may hold up for ever."""

        def look() -> None:
            while self._folder is not None:
                try:
                    self.check()
                except Superseded as lost:
                    on_lost(lost)
                    return
                except OSError:
                    pass  # the next commit says so
                pause.wait(LOOK_SECONDS)

        pause = threading.Event()
        threading.Thread(target=look, name="fence", daemon=True).start()


fence = Fence()
durable.before_commit.append(fence.check)


def _superseded(there: Token, token: Token | None, folder: Path) -> Superseded:
    what = f"{there} has taken over this run; this attempt ({token}) stops without writing."
    return Superseded(what, at=str(folder), do="nothing: the newer attempt goes on.")
