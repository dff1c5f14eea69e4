"""The srun of the ranks: started, listened to, and let go of."""

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import psutil

# What srun says of the first task that ended badly: the others are ended by srun before they can tell of it.
TASK_ERROR = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")


class Srun:
    """One srun; what it says goes on to the job's log."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            list(command), env=dict(env), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._cause = ""
        self._listener = threading.Thread(target=self._listen, name="srun", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            found = TASK_ERROR.match(line)
            if found and not self._cause:
                node, ranks, how = found.groups()
                self._cause = f"rank {ranks} on {node}: {how.strip()}"

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def cause(self) -> str:
        """Of the first rank that ended badly, as srun saw it; empty without one. Once it has ended."""
        self._listener.join(1.0)
        return self._cause

    def wait(self) -> int:
        return self._process.wait()

    def kill(self) -> None:
        """Ends it; a child of it ends the step."""
        self._process.kill()

    def forget(self) -> None:
        """Ends it without ending the step: first the child that would, once srun is dead."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                child.kill()
        self._process.kill()
