"""Faults on purpose, for tests: nothing happens unless TUNESMITH_FAULTS is set.

    TUNESMITH_FAULTS="kill:rank=1,step=3,phase=forward; nan:rank=0,step=5"

Each fault strikes once in a process, when its rank reaches the phase (any, unless given) with that many optimizer steps
done (any, unless given). `seconds` is for slow and sleep; `restart` strikes only in the process that
TUNESMITH_RESTART numbers so (0, unless given).

    TUNESMITH_FAULTS="kill_at_file:rank=1,save=2,operation=17; full_disk:rank=1,save=1; list_files:into=/tmp/operations"

kill_at_file and full_disk strike at a file operation of a save, both counted from 1 (any, unless given; full_disk also
at every operation after it in that save); list_files writes each operation of each save to <into>.<rank>, a line each.
"""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.stop import rank_in_environment

if TYPE_CHECKING:
    import torch

VARIABLE = "TUNESMITH_FAULTS"
RESTART = "TUNESMITH_RESTART"  # how many attempts there were before this one
FILE_KINDS = ("kill_at_file", "full_disk", "list_files")
LOSS_FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 50.0}
NOT_BY_PHASE = (*LOSS_FACTORS, *FILE_KINDS)
SIGNALS = ("kill", "stop", "term", "int", "usr1")
KINDS = (*SIGNALS, *LOSS_FACTORS, "exit", "raise", "sleep", "slow", "gil", "oom", "flip", *FILE_KINDS)


@dataclass
class Fault:
    """One planned fault; None matches everything. last_step: strikes again at each step up to it."""

    kind: str
    rank: int | None = None
    step: int | None = None
    last_step: int | None = None
    phase: Phase | None = None
    seconds: float = 3600.0
    restart: int = 0
    save: int | None = None
    operation: int | None = None
    into: str = ""
    struck: bool = False

    def strikes(self, rank: int, step: int, phase: Phase) -> bool:
        repeats = self.last_step is not None
        return (
            (repeats or not self.struck)
            and self.rank in (None, rank)
            and (self.step is None or self.step <= step <= (self.last_step or self.step))
            and self.phase in (None, phase)
        )

    def strikes_file(self, rank: int, save: int, operation: int) -> bool:
        lasts = self.kind == "full_disk"
        return (
            self.rank in (None, rank)
            and self.save in (None, save)
            and (self.operation is None or self.operation == operation or (lasts and self.operation < operation))
        )


class FaultPlan:
    """The faults of this process. `weights` gives what a bit is flipped in (run/planned_faults.py)."""

    def __init__(self, faults: list[Fault], rank: int) -> None:
        self.faults = faults
        self.rank = rank
        self.weights: Callable[[], torch.Tensor | None] | None = None
        self._num_saves = 0
        self._num_operations = 0
        self._saving = False

    @classmethod
    def from_environment(cls) -> "FaultPlan | None":
        """None without TUNESMITH_FAULTS. Raises ValueError for a plan that is not understood."""
        text = os.environ.get(VARIABLE, "").strip()
        if not text:
            return None
        restart = int(os.environ.get(RESTART, "0"))
        faults = [parse(part) for part in text.split(";") if part.strip()]
        return cls([fault for fault in faults if fault.restart == restart], rank_in_environment())

    def strike(self, step: int, phase: Phase) -> None:
        """What is planned for this place, but for losses, which loss_factor() spoils."""
        for fault in self.faults:
            if fault.kind in NOT_BY_PHASE or not fault.strikes(self.rank, step, phase):
                continue
            if fault.kind != "flip":
                fault.struck = True
                act(fault)
            elif phase is Phase.update and self.weights is not None:
                fault.struck = True
                flip_a_bit(self.weights())

    def save_begins(self) -> None:
        self._num_saves, self._num_operations, self._saving = self._num_saves + 1, 0, True

    def save_ends(self) -> None:
        self._saving = False

    def at_file(self, kind: str, path: str) -> None:
        """What is planned for an operation on a file; only those of saves count. Raises OSError for a full disk."""
        if not self._saving:
            return
        self._num_operations += 1
        for fault in self.faults:
            if fault.kind in FILE_KINDS and fault.strikes_file(self.rank, self._num_saves, self._num_operations):
                if fault.kind == "kill_at_file":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif fault.kind == "full_disk":
                    if kind == "unlink":
                        continue
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                else:
                    with open(f"{fault.into}.{self.rank}", "a", encoding="utf-8") as file:
                        file.write(f"{self._num_saves} {self._num_operations} {kind} {path}\n")

    def loss_factor(self, step: int) -> float:
        """What the loss of this rank's next forward is multiplied by."""
        for fault in self.faults:
            if fault.kind in LOSS_FACTORS and fault.strikes(self.rank, step, Phase.forward):
                fault.struck = True
                return LOSS_FACTORS[fault.kind]
        return 1.0


def parse(text: str) -> Fault:
    """One fault from `kind:name=value,...`. Raises ValueError."""
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise ValueError(f"{VARIABLE}: there is no fault {kind!r}; there are {', '.join(KINDS)}.")
    fault = Fault(kind, seconds=0.3 if kind == "slow" else 3600.0)
    for pair in filter(None, rest.split(",")):
        name, _, value = pair.strip().partition("=")
        if name not in ("rank", "step", "last_step", "phase", "seconds", "restart", "save", "operation", "into"):
            raise ValueError(f"{VARIABLE}: a fault has no {name!r}.")
        setattr(fault, name, READ.get(name, int)(value))
    return fault


def phase_named(words: str) -> Phase:
    """Raises ValueError where there is no such phase."""
    for phase in Phase:
        if phase == words:
            return phase
    raise ValueError(f"{VARIABLE}: there is no phase {words!r}; there are {', '.join(Phase)}.")


READ: dict[str, Callable[[str], object]] = {"phase": phase_named, "into": str, "seconds": float}


def flip_a_bit(weight: "torch.Tensor | None") -> None:
    """The lowest bit of the first element, as a bad memory would. None: this rank holds nothing of the weight."""
    if weight is not None:
        import torch

        bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
        weight.detach().view(-1)[:1].view(bits).bitwise_xor_(1)


def act(fault: Fault) -> None:
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), getattr(signal, f"SIG{fault.kind.upper()}"))
    elif fault.kind == "exit":
        os._exit(0)
    elif fault.kind == "raise":
        raise RuntimeError("planned fault")
    elif fault.kind in ("sleep", "slow"):
        time.sleep(fault.seconds)
    elif fault.kind == "gil":
        re.match(r"(a+)+$", "a" * 64 + "b")  # years, and no other thread runs meanwhile
    elif fault.kind == "oom":
        held = []
        while True:
            held.append(bytearray(64 * 2**20))
            sys.stderr.flush()
