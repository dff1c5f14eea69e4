"""How long a rank may stand still before it counts as hanging, by what it is doing."""

from dataclasses import dataclass

from tunesmith.train.config.config import ClusterConfig
from tunesmith.train.ranks.phases import Phase, TimeoutKind

SPARE_SECONDS = 60.0  # of the process group's own timeout: the watchdog is first, and says more


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

    def kind(self, phase: Phase, *, started: bool) -> TimeoutKind:
        """The kind of a phase; `started` is True once this process has done an optimizer step.

        Kernels are compiled and caches filled in the first one, which may take as long as a start.
        """
        return TimeoutKind.start if phase.kind is TimeoutKind.step and not started else phase.kind

    def seconds(self, kind: TimeoutKind) -> float:
        if kind is TimeoutKind.step:
            return self.step
        return self.start if kind is TimeoutKind.start else self.save

    @property
    def of_process_group(self) -> float:
        """Seconds after which a collective fails by itself."""
        return max(self.start, self.step, self.save) + SPARE_SECONDS
