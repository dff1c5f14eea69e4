"""Where trials run beside each other on this machine, each by the ordinary launcher; slurm_jobs.py has the others."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from tunesmith.launch.sweeping.plan import Plan
from tunesmith.train.errors import EXIT_STOPPED, ConfigError
from tunesmith.train.files.run_folder import JOB, OURS

LAUNCH = Path(__file__).absolute().parents[1]
# Of the process that starts the sweep: a trial is no rank of it.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KILL_SECONDS = 900.0  # after it was asked to stop: more than a save takes
LOOK_AGAIN_SECONDS = 2.0  # after others have taken the GPUs


class NotNow(Exception):
    """A trial could not be started, for a reason that is not its own and passes. In words, with a full stop."""

    def __init__(self, why: str, seconds: float) -> None:
        super().__init__(why)
        self.seconds = seconds  # until it is worth another try


@dataclass(frozen=True)
class Ended:
    """A trial's processes are gone. code: the training's exit code; None where a scheduler has it."""

    code: int | None = None


class Attempt(Protocol):
    """A trial under way."""

    def poll(self) -> Ended | None:
        """None while it runs."""

    def stop(self) -> None:
        """Asks it to save and end."""

    def described(self) -> str:
        """Where it runs, in words."""


class Place(Protocol):
    """Somewhere to run trials."""

    def has_room(self) -> bool: ...

    def start(self, number: int, overrides: list[str], job_id: str | None) -> Attempt:
        """Raises TunesmithError for a trial that cannot be run, NotNow for one that can be later."""


def is_busy(folder: Path) -> bool:
    """Whether a training still writes to a run folder: one whose driver was killed saves and ends by itself."""
    lock = folder / f"{OURS}lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def has_job(folder: Path) -> bool:
    """Whether a trial was handed to SLURM."""
    return (folder / JOB / "job.json").is_file()


def training_command(
    ranks: int, config_dir: Path | None, overrides: list[str], *, gpus: list[str], port: int
) -> list[str]:
    """The ordinary launcher: deepspeed, or plain python for one rank. gpus: those to use; none: any, or the CPU."""
    script = str(LAUNCH / "train.py")
    options = ["--config-dir", str(config_dir)] if config_dir else []
    if ranks == 1:
        return [sys.executable, script, *options, *overrides]
    which = ["--include", f"localhost:{','.join(gpus)}"] if gpus else ["--num_gpus", str(ranks)]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, *which, "--master_port", str(port), script, *options, *overrides]


def supervised(command: list[str]) -> list[str]:
    """With the supervisor, which passes a signal on to the ranks and leaves no process behind. It restarts nothing."""
    return [sys.executable, str(LAUNCH / "supervise.py"), "--max-restarts", "0", "--", *command]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trial_environment(port: int) -> dict[str, str]:
    """This process's variables, without those that would make the trial a rank of another run."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return environment | {"MASTER_PORT": str(port)}


@dataclass
class LocalAttempt:
    """A training on this machine, in a session of its own: a Ctrl-C at the sweep's terminal does not reach it."""

    process: subprocess.Popen[bytes]
    gpus: list[str]
    locks: list[FileLock] = field(default_factory=list)
    asked: float | None = None

    def poll(self) -> Ended | None:
        code = self.process.poll()
        if code is None:
            if self.asked is not None and time.monotonic() - self.asked > KILL_SECONDS:
                self.process.kill()  # its ranks see that and end
            return None
        for lock in self.locks:
            lock.release()
        self.locks.clear()
        # A signal ends the supervisor at once where it comes before that listens, or when it does not end in time.
        return Ended(EXIT_STOPPED if code < 0 and self.asked is not None else code)

    def stop(self) -> None:
        if self.asked is None:
            self.asked = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def described(self) -> str:
        return f"on GPU {','.join(self.gpus)}" if self.gpus else "on the CPU"


class LocalSlots:
    """n_jobs trials at a time, each on GPUs that no other trial has, of this sweep or another of this user."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._running: list[LocalAttempt] = []
        self._gpus = visible_gpus(plan.num_gpus)
        if self._gpus and plan.ranks > 1 and not all(name.isdecimal() for name in self._gpus):
            raise ConfigError(
                f"deepspeed takes GPUs by number, not {self._gpus[0]}.",
                at="CUDA_VISIBLE_DEVICES",
                do="write their numbers, such as 0,1,2,3.",
            )

    def has_room(self) -> bool:
        self._running = [attempt for attempt in self._running if attempt.process.poll() is None]
        if len(self._running) >= self._plan.settings.n_jobs:
            return False
        if not self._gpus:
            return True
        locks = self._take_gpus()
        for lock in locks.values():
            lock.release()
        return len(locks) == self._plan.ranks

    def start(self, number: int, overrides: list[str], job_id: str | None) -> LocalAttempt:
        plan, locks, port = self._plan, self._take_gpus(), free_port()
        gpus = list(locks)
        if self._gpus and len(gpus) < plan.ranks:
            for lock in locks.values():
                lock.release()
            raise NotNow("another trial was faster to take its GPUs.", LOOK_AGAIN_SECONDS)
        command = supervised(training_command(plan.ranks, plan.config_dir, overrides, gpus=gpus, port=port))
        environment = trial_environment(port)
        if gpus and plan.ranks == 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[0]
        if "OMP_NUM_THREADS" not in environment:
            ranks = plan.settings.n_jobs * plan.ranks
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
        with plan.log(number).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        attempt = LocalAttempt(process, gpus, list(locks.values()))
        self._running.append(attempt)
        return attempt

    def _take_gpus(self) -> dict[str, FileLock]:
        """As many GPUs as a trial needs, with their locks; fewer when others have them."""
        taken: dict[str, FileLock] = {}
        for gpu in self._gpus:
            lock = FileLock(_lock_folder() / f"gpu-{gpu}.lock", is_singleton=False)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                taken[gpu] = lock
            if len(taken) == self._plan.ranks:
                break
        return taken


def visible_gpus(count: int) -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(number) for number in range(count)]
    return names[:count]


def _lock_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tunesmith-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
