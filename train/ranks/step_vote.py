"""What the ranks tell each other once a step, inside the reduction of its loss: it costs no collective."""

from dataclasses import dataclass

from tunesmith.train.ranks.distributed import World


@dataclass(frozen=True)
class StepVote:
    """What one rank has to say at the end of a step."""

    stop: bool = False  # it was asked to end: a signal, or its time is nearly over
    save: bool = False  # its clock says that a checkpoint is due
    unwritten: bool = False  # it is still writing its part of the checkpoint under way
    failed: bool = False  # it could not write that part
    busy_seconds: float = 0.0  # its own work in the step before, without waiting for other ranks

    def row(self, world: World) -> list[float]:
        """Numbers to be summed over the ranks: [4 + world_size]."""
        busy = [0.0] * world.world_size
        busy[world.rank] = self.busy_seconds
        return [float(self.stop), float(self.save), float(self.unwritten), float(self.failed), *busy]


@dataclass(frozen=True)
class StepConsensus:
    """What all ranks together said, the same on each of them."""

    stop: bool
    save: bool
    unwritten: bool
    failed: bool
    busy_seconds: tuple[float, ...]  # of each rank, in rank order

    @classmethod
    def of(cls, sums: list[float]) -> "StepConsensus":
        stop, save, unwritten, failed = (total > 0 for total in sums[:4])
        return cls(stop, save, unwritten, failed, tuple(sums[4:]))
