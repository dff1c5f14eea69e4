"""This start of a job, and whether it is still the current one, as SLURM's controller and the run folder tell it."""

import os
import sys
import time
from dataclasses import dataclass

from tunesmith.launch.cluster import controller
from tunesmith.launch.cluster.queue import JobFacts, job_facts
from tunesmith.train.errors import ConfigError, TunesmithError
from tunesmith.train.files.fence import Superseded, fence

CONTROLLER_SECONDS = 3600.0  # for the controller to answer, before the job gives up
RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class Allocation:
    """This start of the job."""

    job_id: str
    restart: int
    nodes: tuple[str, ...]

    @classmethod
    def from_environment(cls) -> "Allocation":
        """Raises ConfigError outside of a job."""
        job_id = os.environ.get("SLURM_JOB_ID")
        if job_id is None or "SLURM_JOB_NODELIST" not in os.environ:
            raise ConfigError("this is not a SLURM job.", at="SLURM_JOB_ID", do="submit it with launch/slurm.py.")
        nodes = controller.host_names(os.environ["SLURM_JOB_NODELIST"])
        return cls(job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")), tuple(nodes))


class StartStatus:
    """The status of one start of a job."""

    def __init__(self, allocation: Allocation) -> None:
        self._job_id = allocation.job_id
        self._restart = allocation.restart
        self._limit: float | None = None
        self._is_unreachable = False

    def note_limit(self) -> None:
        """Asks for the job's time limit while it runs: scancel sets it to the moment of the scancel."""
        facts = self.facts()
        self._limit = facts.end_time if facts else None

    def time_is_over(self) -> bool:
        return self._limit is not None and time.time() >= self._limit - 1.0

    def facts(self) -> JobFacts | None:
        """What the queue says; None where the controller cannot be reached, or knows no such job."""
        try:
            found = job_facts(self._job_id)
        except TunesmithError:
            self._is_unreachable = True
            return None
        self._is_unreachable = False
        return found

    def was_restarted(self, facts: JobFacts | None) -> bool:
        return facts is not None and facts.restarts > self._restart

    def is_fenced_off(self) -> bool:
        """Whether a newer start has taken the run folder. Quick: it reads one file."""
        try:
            fence.check()
        except Superseded:
            return True
        except OSError:  # the file system cannot be reached
            return False
        return False

    def is_superseded(self) -> bool:
        """Whether this node was cut off, and the job has been started again on others.

        Waits for the controller: a node that is cut off cannot know what has become of the job.
        """
        deadline, said = time.monotonic() + CONTROLLER_SECONDS, False
        while True:
            if self.is_fenced_off():
                return True
            facts = self.facts()
            if not self._is_unreachable or time.monotonic() > deadline:
                return self.was_restarted(facts)
            if not said:
                said = True
                sys.stdout.write(
                    f"job: SLURM's controller does not answer; asking again for {CONTROLLER_SECONDS:g} s\n"
                )
                sys.stdout.flush()
            time.sleep(RETRY_SECONDS)
