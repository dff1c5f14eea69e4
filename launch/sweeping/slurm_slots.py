"""Where trials run that are jobs of SLURM, which requeue themselves."""

import contextlib
import io
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

from tunesmith.launch.cluster.cancel import cancel
from tunesmith.launch.cluster.job_folder import find_job
from tunesmith.launch.cluster.queue import FINAL, job_state
from tunesmith.launch.cluster.submit import submit
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.slots import NotNow, Slots
from tunesmith.train.errors import TrainingError, TunesmithError

QUEUE_SECONDS = 5.0  # between two looks at SLURM's queue, for each job
QUEUE_PATIENCE_SECONDS = 600.0  # for a controller that does not answer
SUBMIT_AGAIN_SECONDS = 30.0  # after SLURM would not take a job just then
# What sbatch says when the job is right and the moment is not: nobody answers, or enough jobs are in the queue.
NOT_NOW = re.compile(
    r"did not answer|unable to contact|timed out|connection refused|zero bytes were|standby mode"
    r"|temporarily un|(QOS|Assoc)\w*Submit\w*Limit",
    re.IGNORECASE,
)


@dataclass
class SlurmTrial:
    """A job in SLURM's queue, which may requeue itself."""

    job_id: str
    run_dir: Path
    looked: float = 0.0
    silent_since: float | None = None
    asked: float = -math.inf  # when it was asked to stop, or that was tried
    is_asked: bool = False

    def has_ended(self) -> bool:
        if time.monotonic() - self.looked < QUEUE_SECONDS:
            return False
        self.looked = time.monotonic()
        try:
            state = job_state(self.job_id)
        except TunesmithError:
            self.silent_since = self.silent_since or self.looked
            if self.looked - self.silent_since > QUEUE_PATIENCE_SECONDS:
                raise
            return False
        self.silent_since = None
        return state is None or state in FINAL

    def exit_code(self) -> None:
        """The run folder says how it ended."""

    def stop(self) -> None:
        if self.is_asked or time.monotonic() - self.asked < QUEUE_SECONDS:
            return
        with contextlib.suppress(TunesmithError), contextlib.redirect_stdout(io.StringIO()):
            cancel(["--save", str(self.run_dir)])
            self.is_asked = True  # else SLURM did not answer, or the job has just ended, which has_ended() sees
        self.asked = time.monotonic()

    def described(self) -> str:
        return f"as job {self.job_id}"


class SlurmSlots(Slots):
    """Trials in SLURM's queue. A sweep that is started again finds its jobs there."""

    def __init__(self, plan: SweepPlan) -> None:
        self._plan = plan

    def start(self, number: int, overrides: list[str], job_id: str | None) -> SlurmTrial:
        folder = self._plan.trial_folder(number)
        try:
            job_id = self._in_queue(folder, job_id) or submit(overrides, folder, self._plan.config_dir)
        except TunesmithError as error:
            if isinstance(error, TrainingError) or NOT_NOW.search(error.what):
                raise NotNow(error.what, SUBMIT_AGAIN_SECONDS) from None
            raise
        return SlurmTrial(job_id, folder)

    def _in_queue(self, folder: Path, job_id: str | None) -> str | None:
        """The job of the trial where it has not ended. A driver may have been killed before it noted down which."""
        job = find_job(folder)
        known = job.job_id if job else job_id
        state = job_state(known) if known else None
        return known if state is not None and state not in FINAL else None
