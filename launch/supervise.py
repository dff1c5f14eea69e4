"""Runs a training and starts it again when it dies.

    python launch/supervise.py -- deepspeed --num_gpus 8 launch/train.py +exp=support_bot key=value ...
    python launch/supervise.py --max-restarts 20 -- torchrun --nproc_per_node 2 launch/train.py ...

Every attempt has the same output_dir (added when the command names none) and goes on from its newest whole checkpoint.
A training that finished (0), was asked to stop (75) or cannot be run as given (2) is not started again. SIGTERM, SIGINT
and SIGUSR1 are passed on to the ranks, which save. The exit code is the training's.

Options, before the --:
    --max-restarts 10     restarts in all; progress does not give any back
    --no-progress 3       attempts in a row without a newer checkpoint, after which it gives up
    --backoff-seconds 5   wait before a restart; doubled up to 5 minutes for as long as there is no newer checkpoint
"""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tunesmith.launch.arguments import main, take_option
from tunesmith.launch.training_process import TrainingProcess
from tunesmith.train.config.compose import parse_override
from tunesmith.train.config.override_text import override_of
from tunesmith.train.errors import EXIT_MISTAKE, EXIT_STOPPED, ConfigError
from tunesmith.train.files.step_folders import newest_checkpoint
from tunesmith.train.paths import user_path
from tunesmith.train.printable import printable
from tunesmith.train.ranks.fault_plan import RESTART
from tunesmith.train.ranks.stop import SIGNALS, end

LONGEST_BACKOFF = 300.0


@dataclass(frozen=True)
class Limits:
    """When to give up."""

    max_restarts: int
    no_progress: int
    backoff_seconds: float


def supervise(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments[: arguments.index("--") if "--" in arguments else None]):
        sys.stdout.write(__doc__ or "")
        return
    limits, command = read(arguments)
    end(Supervisor(limits, command).run())


def read(arguments: list[str]) -> tuple[Limits, list[str]]:
    """The options before `--` and the command after it. Raises ConfigError."""
    do = "write: python launch/supervise.py -- deepspeed --num_gpus 8 launch/train.py +exp=..."
    if "--" not in arguments:
        raise ConfigError("the command to run is missing.", at="command line", do=do)
    place = arguments.index("--")
    options, command = arguments[:place], arguments[place + 1 :]
    restarts, options = take_option(options, "--max-restarts")
    no_progress, options = take_option(options, "--no-progress")
    backoff, options = take_option(options, "--backoff-seconds")
    if options:
        raise ConfigError(f"{options[0]!r} is not understood.", at="command line", do=do)
    if not any(Path(part).name == "train.py" for part in command):
        raise ConfigError("the command does not run launch/train.py.", at="command line", do=do)
    if shutil.which(command[0]) is None:
        raise ConfigError(f"there is no program {command[0]!r}.", at="command line", do=do)
    return Limits(
        max_restarts=int(_number("--max-restarts", restarts or "10", r"\d+")),
        no_progress=int(_number("--no-progress", no_progress or "3", r"[1-9]\d*")),
        backoff_seconds=_number("--backoff-seconds", backoff or "5", r"\d+(\.\d+)?"),
    ), command


def _number(name: str, text: str, pattern: str) -> float:
    if not re.fullmatch(pattern, text):
        raise ConfigError(f"{name}={text} is no number that fits.", at="command line")
    return float(text)


def with_output_dir(command: Sequence[str]) -> tuple[list[str], Path]:
    """The command, naming a run folder that all its attempts share; and the folder."""
    named = [parse_override(part).value() for part in command if re.match(r"\+{0,2}output_dir=.", part)]
    if named and named[-1] is not None:
        return list(command), user_path(str(named[-1])).absolute()
    folder = Path("runs", f"supervised-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    return [*command, override_of("output_dir", folder)], folder


class Supervisor:
    """Starts attempts until one of them ends for good."""

    def __init__(self, limits: Limits, command: Sequence[str]) -> None:
        self._limits = limits
        self._command, self._folder = with_output_dir(command)
        self._attempt: TrainingProcess | None = None
        self._asked: signal.Signals | None = None

    def run(self) -> int:
        """The exit code of the training."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        best, without_progress = newest_checkpoint(self._folder), 0
        for restart in range(self._limits.max_restarts + 1):
            code, died = self._try(restart)
            if not died:
                return code
            newest = newest_checkpoint(self._folder)
            without_progress = 0 if newest > best else without_progress + 1
            best = max(best, newest)
            if without_progress >= self._limits.no_progress:
                tell(f"giving up: {without_progress} attempts in a row made no newer checkpoint than step {best}")
                return code
            if restart == self._limits.max_restarts:
                tell(f"giving up: it died {restart + 1} times (--max-restarts {self._limits.max_restarts})")
                return code
            seconds = min(self._limits.backoff_seconds * 2 ** max(0, without_progress - 1), LONGEST_BACKOFF)
            tell(f"restart {restart + 1} of at most {self._limits.max_restarts} from step {best} in {seconds:g} s")
            if self._waits_in_vain(seconds):
                return EXIT_STOPPED
        raise AssertionError("the last attempt returns")

    def _try(self, restart: int) -> tuple[int, bool]:
        """Exit code of one attempt, and whether it died, so that another one may help."""
        goes_on = ["resume.source=auto"] if restart and newest_checkpoint(self._folder) else []
        self._attempt = TrainingProcess([*self._command, *goes_on], {RESTART: str(restart)})
        if self._asked:  # meanwhile
            self._attempt.pass_on(self._asked)
        ended = self._attempt.wait()
        self._attempt = None
        if ended.mistake:
            return EXIT_MISTAKE, False
        if ended.finished or _is_finished(self._folder, ended.code):
            return 0, False
        if ended.was_stopped or (self._asked and ended.has_obeyed):
            return EXIT_STOPPED, False
        tell(f"the training died: {ended.how}")
        return ended.code or 1, not self._asked

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number)
        if self._attempt is not None:
            self._attempt.pass_on(signal.Signals(number))

    def _waits_in_vain(self, seconds: float) -> bool:
        """Waits before a restart; True as soon as a signal says that there is to be none."""
        until = time.monotonic() + seconds
        while not self._asked and time.monotonic() < until:
            time.sleep(0.1)
        return self._asked is not None


def _is_finished(folder: Path, code: int) -> bool:
    """For a command whose ranks are on other machines: their exit codes do not reach us."""
    from tunesmith.train.files.run_folder import is_finished

    return code == 0 and is_finished(folder)


def tell(text: str) -> None:
    sys.stderr.write(f"supervise: {printable(text)}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    os.environ.pop("RANK", None)  # a supervisor is no rank
    main(supervise)
