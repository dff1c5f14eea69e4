"""How long a rank may stand still before it counts as hanging, by what it is doing."""

from dataclasses import dataclass
from enum import IntEnum

from tunesmith.train.config.config import ClusterConfig

# How phases begin that write or read whole models, or get ready.
SAVING = ("saving", "writing", "committing", "publishing", "opening the saved model", "bringing back")
STARTING = ("starting", "looking for", "converting", "loading", "making the engine", "taking up")
SPARE_SECONDS = 60.0  # of the process group's own timeout: the watchdog is first, and says more


class TimeoutKind(IntEnum):
    start = 0
    step = 1
    save = 2


KEYS = {
    TimeoutKind.start: "cluster.start_timeout_minutes",
    TimeoutKind.step: "cluster.timeout_minutes",
    TimeoutKind.save: "cluster.save_timeout_minutes",
}


@dataclass(frozen=True)
class Timeouts:
    """Seconds for each kind of phase."""

    start: float
    step: float
    save: float

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Timeouts":
        return cls(60 * cluster.start_timeout_minutes, 60 * cluster.timeout_minutes, 60 * cluster.save_timeout_minutes)

    def kind(self, phase: str, *, started: bool) -> TimeoutKind:
        """The kind of a phase; `started` is True once this process has done an optimizer step.

        Kernels are compiled and caches filled in the first one.
        """
        if phase.startswith(SAVING):
            return TimeoutKind.save
        return TimeoutKind.step if started and not phase.startswith(STARTING) else TimeoutKind.start

    def seconds(self, kind: TimeoutKind) -> float:
        if kind is TimeoutKind.step:
            return self.step
        return self.start if kind is TimeoutKind.start else self.save

    @property
    def of_process_group(self) -> float:
        """Seconds after which a collective fails by itself."""
        return max(self.start, self.step, self.save) + SPARE_SECONDS
