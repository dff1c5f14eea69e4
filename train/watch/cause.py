"""What happened to a run, in one line: which rank, at which step, in which phase, and how.

Nothing here waits or kills: it reads the ranks' table and the kernel, and words what they say.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.train.errors import TunesmithError
from tunesmith.train.ranks.phases import TimeoutKind
from tunesmith.train.watch.rank_status import RankStatus
from tunesmith.train.watch.timeouts import KEYS

BEAT_IS_STALE = 3.0  # seconds without a heartbeat, which comes several times a second


@dataclass(frozen=True)
class Cause:
    """Why a run ends."""

    rank: int
    step: int
    phase: str
    kind: str  # killed, exited, hang, lost, error, superseded
    line: str


def process_state(pid: int) -> str:
    """The kernel's letter for a process: R, S, D run or wait, T is stopped, Z has ended; empty when it is gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def wait_status(pid: int) -> int | None:
    """What waitpid would give for a process that has ended and was not waited for; None where it is unknown."""
    fields = _stat(pid)
    return int(fields[49]) if len(fields) > 49 and fields[0] in "ZX" else None


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold blanks


def num_oom_kills() -> int:
    """How often the kernel has killed for lack of memory: in this process's cgroup, else on the host."""
    for file in (_memory_events(), Path("/proc/vmstat")):
        try:
            rows = dict(line.split() for line in file.read_text().splitlines())
            return int(rows["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue
    return 0


def _memory_events() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return Path("/sys/fs/cgroup/memory.events")
    own = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "/")
    return Path("/sys/fs/cgroup") / own.lstrip("/") / "memory.events"


def death(status: RankStatus, world_size: int, exit_status: int | None, oom_kills: int) -> Cause:
    """A rank that ended before the run was over; oom_kills are those since the run started."""
    if exit_status is None:
        how = "ended, before the run was over,"
    elif exit_status & 0x7F:
        number = exit_status & 0x7F
        how = f"was killed by {_signal_name(number)}"
    else:
        how = f"exited with code {exit_status >> 8 & 0xFF}, before the run was over,"
    line = f"{_who(status, world_size)} {how} {status.where}"
    if exit_status is not None and exit_status & 0x7F == signal.SIGKILL:
        line += (
            "; the kernel did it for lack of memory"
            if oom_kills
            else "; if not by hand, dmesg and the cgroup's memory.events say whether for lack of memory"
        )
    return Cause(
        status.rank,
        status.step,
        status.phase,
        "killed" if exit_status is not None and exit_status & 0x7F else "exited",
        line,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _who(status: RankStatus, world_size: int) -> str:
    return f"rank {status.rank} of {world_size} (pid {status.pid})"


def hang(
    late: RankStatus,
    statuses: Sequence[RankStatus],
    world_size: int,
    now: float,
    states: dict[int, str],
    nodes: Mapping[int, str] | None = None,
) -> Cause | None:
    """Names the rank that the others wait for, when `late` has stood still for longer than it may.

    None while the rank they wait for moves on: it is slow, which is no reason to end a run.

    Args:
        statuses: all ranks that still run.
        states: of the processes of this node, by rank, as process_state() gives them.
        nodes: the names of the other nodes, by rank.
    """
    silent = [status for status in statuses if now - status.beat > BEAT_IS_STALE and states.get(status.rank) != "T"]
    elsewhere = [status for status in silent if status.rank not in states]
    stopped = [status for status in statuses if states.get(status.rank) == "T"]
    behind = min(statuses, key=lambda status: (status.collective, status.num_changes))
    ahead = max(statuses, key=lambda status: (status.collective, status.num_changes))
    if stopped:
        return _hang(stopped[0], statuses, world_size, now, "is stopped (SIGSTOP, or a debugger)")
    if elsewhere:
        return lost(elsewhere[0], world_size, now, nodes)
    if silent:
        return _hang(silent[0], statuses, world_size, now, "hangs", ", inside C code that holds the interpreter's lock")
    if (behind.collective, behind.num_changes) != (ahead.collective, ahead.num_changes) or len(statuses) == 1:
        return _hang(behind, statuses, world_size, now, "hangs")
    line = (
        f"all ranks hang {late.where}, in the same collective (number {late.collective}): {_still(late, now)}; the "
        "network between them is the suspect, as no rank is behind another"
    )
    return Cause(late.rank, late.step, late.phase, "hang", line)


def lost(status: RankStatus, world_size: int, now: float, nodes: Mapping[int, str] | None = None) -> Cause:
    """A rank of another node of which nothing is heard any more; nodes has the names of those nodes, by rank."""
    on = f" on {nodes[status.rank]}" if nodes and status.rank in nodes else ""
    line = (
        f"rank {status.rank} of {world_size}{on} was last heard of {now - status.beat:.0f} s ago, {status.where}: its "
        "node, or the network to it, is gone"
    )
    return Cause(status.rank, status.step, status.phase, "lost", line)


def _hang(
    status: RankStatus, statuses: Sequence[RankStatus], world_size: int, now: float, how: str, inside: str = ""
) -> Cause | None:
    if now - status.changed <= status.allowed:
        return None
    line = f"{_who(status, world_size)} {how} {status.where}{inside}: {_still(status, now)}"
    waiting = [str(other.rank) for other in statuses if other.rank != status.rank]
    if waiting:
        line += f"; rank {', '.join(waiting)} wait{'s' if len(waiting) == 1 else ''} for it"
    return Cause(status.rank, status.step, status.phase, "hang", line)


def _still(status: RankStatus, now: float) -> str:
    key = KEYS[TimeoutKind(status.timeout_kind)]
    return f"nothing moved for {now - status.changed:.0f} s ({key}={status.allowed / 60:g})"


def error(rank: int, world_size: int, step: int, phase: str, raised: BaseException) -> Cause:
    """A rank that raised."""
    said = " ".join((raised.what if isinstance(raised, TunesmithError) else str(raised)).split())
    line = f"rank {rank} of {world_size} failed at step {step}, in {phase}: {type(raised).__name__}"
    return Cause(rank, step, phase, "error", f"{line}: {said[:300]}" if said else line)
