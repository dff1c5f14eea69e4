"""Cancels the SLURM job of a run.

    python launch/slurm.py cancel <run>          ends it now
    python launch/slurm.py cancel --save <run>   its ranks save first, then the job ends by itself

Either way the job does not requeue itself. The command that submitted it resumes from its newest checkpoint.
"""

import sys
import time

from tunesmith.launch.arguments import run_argument, show_help
from tunesmith.launch.cluster.job_folder import JobFolder, run_folder_of, the_job
from tunesmith.launch.cluster.queue import JobFacts, cancel_job, has_steps, job_facts, signal_steps
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.printable import printable

USAGE = "write: python launch/slurm.py cancel [--save] <run>"


def cancel(arguments: list[str]) -> None:
    """Raises ConfigError where there is nothing to cancel, TrainingError when SLURM does not answer."""
    if show_help(arguments, __doc__):
        return
    names = [argument for argument in arguments if argument != "--save"]
    job = the_job(
        run_folder_of(run_argument(names, USAGE)), "end it where it was started: Ctrl-C, or SIGTERM to its launcher."
    )
    facts = job_facts(job.job_id)
    if facts is None or facts.is_over or (facts.state == "COMPLETING" and job.has_ended()):
        how = f" ({facts.state})" if facts else ""
        raise ConfigError(
            f"job {job.job_id} has ended{how}: there is nothing to cancel.",
            at=str(job.run),
            do="`python launch/slurm.py status <run>` says how.",
        )
    was_forbidden = job.stop_file.exists()
    _forbid_restarts(job)
    try:
        said = _cancel(job, facts, save="--save" in arguments)
    except (ConfigError, TrainingError):
        if not was_forbidden:
            job.stop_file.unlink(missing_ok=True)  # it was not cancelled: it may restart as before
        raise
    sys.stdout.write(f"{printable(said)}\n")


def _cancel(job: JobFolder, facts: JobFacts, *, save: bool) -> str:
    """Cancels the job, and returns what was done, in words."""
    where = f"{facts.state} on {facts.nodes}" if facts.nodes else facts.state
    if save and facts.state == "RUNNING" and has_steps(job.job_id):
        signal_steps(job.job_id, "TERM")
        return f"job {job.job_id} ({where}): its ranks were told to save; it ends when they have."
    cancel_job(job.job_id)
    nothing = "; no ranks were running, so there was nothing to save" if save else ""
    return f"job {job.job_id} ({where}) is cancelled{nothing}."


def _forbid_restarts(job: JobFolder) -> None:
    """Before ranks are told to end: their exit code is that of ranks that want to be started again."""
    try:
        job.stop_file.write_text(f"{time.time():.0f}\n", encoding="utf-8")  # the file counts, not what is in it
    except OSError as error:
        raise TrainingError(
            f"the job could not be kept from restarting: {error.strerror}.",
            at=str(job.stop_file),
            do=f"make the folder writable, or: scancel {job.job_id}",
        ) from None
