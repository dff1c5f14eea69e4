"""Asked to end: by SIGTERM, SIGINT or SIGUSR1, by a launcher that has gone, or because the time is nearly over.

    before the loop   there is nothing to save: the process ends at once, and tells the ranks beside it
    in the loop       a request is only noted. The ranks tell each other at the end of each step and in each batch of an
                      evaluation, save the step that is done, and end together (loop.py, run.py)

Both with exit code EXIT_STOPPED. A thread does the work: a handler runs only between two bytecodes of the main thread,
which may be minutes inside one call. Nothing heavy is imported here, so that it listens from the first moments on.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tunesmith.train.errors import EXIT_STOPPED, Stopped
from tunesmith.train.ranks.launchers import Launchers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER_GONE = "the launcher has gone"
ELSEWHERE = "another rank was asked to stop"
ENDS = "TUNESMITH_ENDS"  # environment: a supervisor's folder, in which each rank leaves its exit code
QUIETLY = "TUNESMITH_STOP_QUIETLY"  # environment: a run that was stopped ends with 0; what it left in ENDS says so
RUNNING = "running"  # what a rank leaves there until then; one that is killed never leaves anything else
LOOK_SECONDS = 0.5  # between two looks at the launchers
UNWIND_SECONDS = 3.0  # for the main thread to release its locks and temporary folders; then the process ends anyway
TELL_SECONDS = 0.3  # for the ranks beside to hear it before this one goes

STARTED = time.monotonic()  # of the process, but for the tenths of a second before this import


class StopRequest:
    """Whether this process was asked to end. One for a process, as it has one set of signal handlers."""

    def __init__(self) -> None:
        self.reason: str | None  # the first one; later ones change nothing
        self._plan: Callable[[], str] | None
        self._raised: bool
        self.forget()
        self._closed = threading.Event()
        self._closed.set()

    def ask(self, reason: str) -> None:
        """From any thread, or from a signal handler."""
        if self.reason is None:
            self.reason = reason

    def defer(self, plan: Callable[[], str]) -> None:
        """From now on a request is only noted; plan says in words what will follow it."""
        self._plan = plan

    def forget(self) -> None:
        """As if nothing had been asked or deferred: the next run of this process is another one."""
        self.reason, self._plan, self._raised = None, None, False

    @property
    def is_deferred(self) -> bool:
        return self._plan is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes signals while the body runs. Raises Stopped in it when it is asked to end, unless that is deferred.

        Once it is stopped the signals stay ignored: the process is at its end, with its exit code.
        """
        self.forget()
        self._closed.clear()
        wakeup_read, wakeup_write = os.pipe()
        os.set_blocking(wakeup_write, False)
        kept_wakeup = signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        kept: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        thread = threading.Thread(target=self._watch, args=(wakeup_read,), name="stop", daemon=True)
        stopped = False
        report(RUNNING)
        try:
            thread.start()
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
                signal.siginterrupt(number, False)  # no library's read or write fails for it
            yield
        except Stopped:
            stopped = True
            raise
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN if stopped else kept[number])
            signal.set_wakeup_fd(kept_wakeup)
            self._closed.set()
            os.write(wakeup_write, b"\0")
            thread.join()
            os.close(wakeup_read)
            os.close(wakeup_write)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if self._plan is None and not self._raised:
            self._raised = True
            raise Stopped(self.reason or "")

    def _watch(self, wakeup_read: int) -> None:
        launchers = Launchers()
        while not self._closed.is_set() and self.reason is None:
            if select.select([wakeup_read], [], [], LOOK_SECONDS)[0]:
                for number in os.read(wakeup_read, 512):
                    if number in SIGNALS:
                        self.ask(signal.Signals(number).name)
            elif launchers.one_has_gone():
                self.ask(LAUNCHER_GONE)
        if self.reason is not None:
            self._answer(launchers.ranks_beside)

    def _answer(self, ranks_beside: Callable[[], list[int]]) -> None:
        plan = self._plan
        if plan is not None:
            if not self._closed.is_set():
                say(f"{self.reason}: {plan()}")
            return
        say(f"{self.reason}: ending before the first step; there is nothing to save")
        for pid in ranks_beside():
            tell(pid)
        time.sleep(TELL_SECONDS)
        if not self._raised and self._plan is None:  # the launcher has gone: no handler has run
            os.kill(os.getpid(), signal.SIGTERM)
        if not self._closed.wait(UNWIND_SECONDS) and self._plan is None:
            end(EXIT_STOPPED, self.reason or "")

    def _forget_in_child(self) -> None:
        """A forked child is not the run: a signal to it ends it, as it would any process."""
        if not self._closed.is_set():
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)


stop_request = StopRequest()
os.register_at_fork(after_in_child=stop_request._forget_in_child)


def rank_in_environment() -> int:
    """0 where no launcher has said otherwise."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def say(text: str) -> None:
    """One line on stderr, from rank 0 alone. Not through Python's files: the main thread may hold their locks."""
    if rank_in_environment() == 0:
        os.write(2, f"{text}\n".encode())


def tell(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def report(text: str) -> None:
    folder = os.environ.get(ENDS)
    if folder and Path(folder).is_dir():
        Path(folder, f"rank-{rank_in_environment()}").write_text(text, encoding="utf-8")


def report_end(code: int, reason: str = "") -> None:
    """Leaves the exit code for a supervisor: torchrun makes 1 of every one but 0, and deepspeed 0 of being killed."""
    report(f"{code} {reason}".strip())


def end(code: int, reason: str = "") -> NoReturn:
    """Ends this process now, from any thread."""
    report_end(code, reason)
    os._exit(code)


def end_stopped(reason: str) -> NoReturn:
    """Ends a process whose run was stopped, all ranks together: with EXIT_STOPPED, or 0 where that is asked for.

    In a SLURM job it is: at another code srun ends the step by its number, and SLURM repeats that 10 s later where a
    node was slow to answer, when the next start of the job has a step of the same number (seen in 22.05).
    """
    report_end(EXIT_STOPPED, reason)
    os._exit(0 if os.environ.get(QUIETLY) else EXIT_STOPPED)
