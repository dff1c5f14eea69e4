"""The processes that started this rank: deepspeed's, torchrun's, our supervisor, a sweep; and the ranks beside it.

They do not all pass a signal on. deepspeed's command ends at SIGTERM and leaves its launch.py and the ranks running;
SIGUSR1 ends torchrun and launch.py and leaves the ranks. So a rank has to look whether they are still there.
"""

from collections.abc import Sequence
from pathlib import PurePath

import psutil

PROGRAMS = {"deepspeed", "torchrun", "supervise.py", "sweep.py"}
MODULES = {
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "tunesmith.launch.supervise",
    "tunesmith.launch.sweep",
}
DEEPSPEED_NODE = "deepspeed.launcher.launch"  # deepspeed's process on each node, the parent of its ranks


def launcher_of(command: Sequence[str]) -> str | None:
    """The launcher that a command line runs: a name of PROGRAMS or MODULES; None for any other program."""
    rest = list(command)
    if rest and PurePath(rest[0]).name.startswith("python"):
        rest.pop(0)
        while rest and rest[0].startswith("-") and rest[0] != "-m":
            rest.pop(0)
        if rest and rest[0] == "-m":
            return rest[1] if len(rest) > 1 and rest[1] in MODULES else None
    name = PurePath(rest[0]).name if rest else ""
    return name if name in PROGRAMS else None


class Launchers:
    """Those above this process, from its parent upwards, as long as they are launchers.

    A shell that someone started a run from is none of them: it may go away.
    """

    def __init__(self) -> None:
        self._above: list[psutil.Process] = []
        self._orphaned = False
        try:
            for process in psutil.Process().parents():
                found = launcher_of(process.cmdline())
                if found is None:
                    break
                self._above.append(process)
                # Without --launcher its parent is deepspeed's command, and with one a shell or sshd: never init.
                self._orphaned = found == DEEPSPEED_NODE and process.ppid() == 1
        except psutil.Error:  # the parent of a launcher is another user's, or has just ended
            pass

    def one_has_gone(self) -> bool:
        return self._orphaned or any(not _runs(process) for process in self._above)

    def ranks_beside(self) -> list[int]:
        """Process ids of the other ranks that the same launcher started."""
        if not self._above:
            return []
        own = psutil.Process()
        try:
            beside = [process for process in self._above[0].children() if process.pid != own.pid]
            return [process.pid for process in beside if _program(process) == _program(own)]
        except psutil.Error:
            return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _program(process: psutil.Process) -> list[str]:
    """Its command line, without what deepspeed adds for each rank."""
    try:
        return [part for part in process.cmdline() if not part.startswith("--local_rank=")]
    except psutil.Error:
        return []
