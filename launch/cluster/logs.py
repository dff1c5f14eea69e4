"""What the ranks and the driver of a SLURM job print.

    python launch/slurm.py logs <run>                of the newest restart: the driver's lines, then each rank's
    python launch/slurm.py logs -f <run>             the last lines, then new ones as they come, until the job has ended
    python launch/slurm.py logs --rank 3 <run>       one rank alone
    python launch/slurm.py logs --restart 0 <run>    an earlier start of the job: 0 is the first
    python launch/slurm.py logs --lines 50 <run>     the last 50 of each file; with -f 10 if not said otherwise

Each line begins with its rank, `[3] `, or with `[job] `. Ctrl-C ends following, not the job.
"""

import os
import re
import select
import sys
import time
from dataclasses import dataclass

from tunesmith.launch.arguments import EXIT_INTERRUPTED, run_argument, show_help, take_option
from tunesmith.launch.cluster.job_folder import JobFolder, run_folder_of, the_job
from tunesmith.launch.cluster.log_file import LogFile
from tunesmith.launch.cluster.queue import job_facts
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.printable import printable
from tunesmith.train.ranks.stop import end

LINES_BEFORE_FOLLOWING = 10
LOOK_SECONDS = 0.5  # between two looks at the files
QUEUE_SECONDS = 10.0  # between two questions to SLURM, which many people ask
USAGE = "write: python launch/slurm.py logs [-f] [--rank N] [--restart N] [--lines N] <run>"


@dataclass(frozen=True)
class LogRequest:
    """What is to be shown."""

    rank: int | None = None  # None: all, and the driver
    restart: int | None = None  # None: the newest
    lines: int | None = None  # of each file, the last ones; None: all
    follow: bool = False


def logs(arguments: list[str]) -> None:
    """Prints the logs. Raises ConfigError where there is no such run, job, restart or rank."""
    if show_help(arguments, __doc__):
        return
    request, run = read(arguments)
    job = the_job(run_folder_of(run), "what it prints is where it was started.")
    viewer = LogViewer(job, request)
    try:
        if request.follow:
            viewer.follow()
        else:
            viewer.show()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it again when it exits
    except KeyboardInterrupt:
        end(EXIT_INTERRUPTED)


def read(arguments: list[str]) -> tuple[LogRequest, str]:
    """What the command line asks for, and the run folder it names. Raises ConfigError."""
    rank, rest = take_option(arguments, "--rank")
    restart, rest = take_option(rest, "--restart")
    lines, rest = take_option(rest, "--lines")
    follow = bool({"-f", "--follow"} & set(rest))
    names = [argument for argument in rest if argument not in ("-f", "--follow")]
    name = run_argument(names, USAGE)
    num_lines = _whole("--lines", lines)
    if num_lines is None and follow:
        num_lines = LINES_BEFORE_FOLLOWING
    request = LogRequest(_whole("--rank", rank), _whole("--restart", restart), num_lines, follow)
    if follow and request.restart is not None:
        raise ConfigError("-f follows the newest restart.", at="command line", do="leave out --restart, or -f.")
    return request, name


def _whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"{name}={text} is not a whole number.", at="command line", do=USAGE)
    return int(text)


class LogViewer:
    """Writes the lines of one job's files to stdout."""

    def __init__(self, job: JobFolder, request: LogRequest) -> None:
        self._job = job
        self._request = request
        self._files: dict[str, LogFile] = {}
        self._said = ""  # the last thing printed about the queue

    def show(self) -> None:
        """Prints what is there now. Raises ConfigError for a rank or restart without a log."""
        restart = self._newest() if self._request.restart is None else self._request.restart
        self._check(restart)
        for name, path in self._paths(restart):
            file = LogFile(path, f"[{name}] ", last_lines=self._request.lines)
            while block := file.read():
                self._write(block)
            self._write(file.rest())
        if restart is None:
            self._say(self._queue_words())

    def follow(self) -> None:
        """Prints what is there, and what comes, until the job has ended."""
        shown: int | None = None
        is_first = True
        asked_at = -QUEUE_SECONDS
        while True:
            is_over = self._job.has_ended()
            if not is_over and time.monotonic() - asked_at >= QUEUE_SECONDS:
                is_over, asked_at = self._has_left_queue(), time.monotonic()
            newest = self._newest()
            if newest != shown:
                self._catch_up()
                self._leave_ranks()
                if shown is not None:
                    self._say(f"restart {newest}")
                shown = newest
            self._open(shown, self._request.lines if is_first else None)
            is_first = False
            self._catch_up()
            if not self._wait():
                raise BrokenPipeError
            if is_over:  # the wait was for the driver's last lines
                break
        self._catch_up()
        for file in self._files.values():
            self._write(file.rest())
        sys.stdout.flush()
        self._say(f"job {self._job.job_id} has ended")

    def _newest(self) -> int | None:
        restarts = self._job.restarts()
        return restarts[-1] if restarts else None

    def _check(self, restart: int | None) -> None:
        if self._request.restart is not None and restart not in self._job.restarts():
            there = ", ".join(map(str, self._job.restarts())) or "none"
            raise ConfigError(f"restart {restart} has no logs; there are: {there}.", at="--restart")
        rank = self._request.rank
        ranks = self._job.rank_logs(restart) if restart is not None else {}
        if rank is not None and rank not in ranks:
            there = f"{min(ranks)} to {max(ranks)}" if ranks else "none yet"
            raise ConfigError(f"rank {rank} has no log; ranks with one: {there}.", at="--rank")

    def _paths(self, restart: int | None) -> list[tuple[str, os.PathLike[str]]]:
        """Names and files, of those that were asked for and exist."""
        ranks = self._job.rank_logs(restart) if restart is not None else {}
        if self._request.rank is not None:
            ranks = {rank: path for rank, path in ranks.items() if rank == self._request.rank}
        found: list[tuple[str, os.PathLike[str]]] = [(str(rank), path) for rank, path in ranks.items()]
        if self._request.rank is None and self._job.driver_log.is_file():
            found.insert(0, ("job", self._job.driver_log))
        return found

    def _open(self, restart: int | None, last_lines: int | None) -> None:
        """Opens files that are new."""
        for name, path in self._paths(restart):
            if name not in self._files:
                self._files[name] = LogFile(path, f"[{name}] ", last_lines=last_lines)

    def _leave_ranks(self) -> None:
        """The files of the restart before are done; those of the new one are shown from their start."""
        for name in [name for name in self._files if name != "job"]:
            self._write(self._files.pop(name).rest())

    def _catch_up(self) -> None:
        """Everything new, a block of each file in turn, so that none keeps the others waiting."""
        busy = list(self._files.values())
        while busy:
            for file in list(busy):
                block = file.read()
                self._write(block)
                if not block:
                    busy.remove(file)
        sys.stdout.flush()

    def _write(self, block: bytes) -> None:
        if block and sys.stdout.isatty():
            block = printable(block.decode(errors="backslashreplace")).encode()
        if block:
            sys.stdout.buffer.write(block)

    def _wait(self) -> bool:
        """Waits a moment; False once nobody reads what is written."""
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return not any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(LOOK_SECONDS * 1000))

    def _has_left_queue(self) -> bool:
        """Whether the job has left SLURM's queue; False when SLURM does not answer: the job's own events tell then."""
        try:
            facts = job_facts(self._job.job_id)
        except (TrainingError, ConfigError) as error:
            self._say(f"{error.what} Following what the job itself says.")
            return False
        if facts is not None and facts.state == "PENDING":
            self._say(f"job {self._job.job_id} is PENDING ({facts.reason})")
        return facts is None or facts.is_over

    def _queue_words(self) -> str:
        try:
            facts = job_facts(self._job.job_id)
        except (TrainingError, ConfigError) as error:
            return f"no rank has a log; {error.what}"
        state = f"is {facts.state} ({facts.reason})" if facts else "is not in the queue"
        return f"no rank has a log; job {self._job.job_id} {state}"

    def _say(self, text: str) -> None:
        """Prints to stderr, as it is not a line of a log; nothing twice in a row."""
        if text != self._said:
            self._said = text
            sys.stdout.flush()
            sys.stderr.write(f"-- {printable(text)}\n")
            sys.stderr.flush()
