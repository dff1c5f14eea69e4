"""Where trials run beside each other on this machine, each by the ordinary launcher.

slurm_slots.py and submitit_slots.py have the trials that are jobs.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from tunesmith.launch.environment import free_port
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.train.errors import EXIT_STOPPED, ConfigError
from tunesmith.train.files.run_folder import HIDDEN_PREFIX

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


class StartedTrial(Protocol):
    """A trial under way."""

    def has_ended(self) -> bool: ...

    def exit_code(self) -> int | None:
        """Of the training that has ended; None where its run folder alone says how."""

    def stop(self) -> None:
        """Asks it to save and end."""

    def described(self) -> str:
        """Where it runs, in words."""


class Slots(Protocol):
    """Somewhere to run trials. The driver starts no more than n_jobs of them."""

    def has_room(self) -> bool:
        return True

    def start(self, number: int, overrides: list[str], job_id: str | None) -> StartedTrial:
        """Raises TunesmithError for a trial that cannot be run, NotNow for one that can be later."""


def is_busy(folder: Path) -> bool:
    """Whether a training still writes to a run folder: one whose driver was killed saves and ends by itself."""
    lock = folder / f"{HIDDEN_PREFIX}lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def start_training(
    command: list[str], log: Path, environment: Mapping[str, str], *, new_session: bool = False
) -> subprocess.Popen[bytes]:
    """Starts it in the background, with its output in the log."""
    with log.open("ab") as file:
        return subprocess.Popen(
            supervised(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=new_session,
        )


def supervised(command: list[str]) -> list[str]:
    """With the supervisor, which passes a signal on to the ranks and leaves no process behind. It restarts nothing."""
    return [sys.executable, str(LAUNCH / "supervise.py"), "--max-restarts", "0", "--", *command]


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


def trial_environment(port: int) -> dict[str, str]:
    """This process's variables, without those that would make the trial a rank of another run."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return environment | {"MASTER_PORT": str(port)}


def code_of(process: subprocess.Popen[bytes], *, was_asked: bool) -> int:
    """A signal ends the supervisor at once where it comes before that listens, or when it does not end in time."""
    return EXIT_STOPPED if process.returncode < 0 and was_asked else process.returncode


@dataclass
class LocalTrial:
    """A training on this machine, in a session of its own: a Ctrl-C at the sweep's terminal does not reach it."""

    process: subprocess.Popen[bytes]
    locks: dict[str, FileLock] = field(default_factory=dict)  # of its GPUs
    asked: float | None = None

    def has_ended(self) -> bool:
        if self.process.poll() is None:
            if self.asked is not None and time.monotonic() - self.asked > KILL_SECONDS:
                self.process.kill()  # its ranks see that and end
            return False
        _release(self.locks)
        return True

    def exit_code(self) -> int | None:
        return code_of(self.process, was_asked=self.asked is not None)

    def stop(self) -> None:
        if self.asked is None:
            self.asked = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def described(self) -> str:
        return f"on GPU {','.join(self.locks)}" if self.locks else "on the CPU"


class LocalSlots(Slots):
    """Trials on GPUs that no other trial has, of this sweep or another of this user."""

    def __init__(self, plan: SweepPlan) -> None:
        self._plan = plan
        self._gpus = visible_gpus(plan.num_gpus)
        if self._gpus and plan.ranks > 1 and not all(name.isdecimal() for name in self._gpus):
            raise ConfigError(
                f"deepspeed takes GPUs by number, not {self._gpus[0]}.",
                at="CUDA_VISIBLE_DEVICES",
                do="write their numbers, such as 0,1,2,3.",
            )

    def has_room(self) -> bool:
        locks = self._take_gpus()
        _release(locks)
        return locks is not None

    def start(self, number: int, overrides: list[str], job_id: str | None) -> LocalTrial:
        plan, locks, port = self._plan, self._take_gpus(), free_port()
        if locks is None:
            raise NotNow("another trial was faster to take its GPUs.", LOOK_AGAIN_SECONDS)
        environment = trial_environment(port)
        if locks and plan.ranks == 1:
            environment["CUDA_VISIBLE_DEVICES"] = next(iter(locks))
        threads = (os.cpu_count() or 1) // (plan.settings.n_jobs * plan.ranks)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        command = training_command(plan.ranks, plan.config_dir, overrides, gpus=list(locks), port=port)
        return LocalTrial(start_training(command, plan.log(number), environment, new_session=True), locks)

    def _take_gpus(self) -> dict[str, FileLock] | None:
        """As many GPUs as a trial needs, with their locks: none on the CPU. None when others have them."""
        taken: dict[str, FileLock] = {}
        for gpu in self._gpus:
            lock = FileLock(_lock_folder() / f"gpu-{gpu}.lock", is_singleton=False)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                taken[gpu] = lock
            if len(taken) == self._plan.ranks:
                break
        if self._gpus and len(taken) < self._plan.ranks:
            _release(taken)
            return None
        return taken


def _release(locks: dict[str, FileLock] | None) -> None:
    for lock in (locks or {}).values():
        lock.release()


def visible_gpus(count: int) -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(number) for number in range(count)]
    return names[:count]


def _lock_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tunesmith-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
