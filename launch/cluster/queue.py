"""What SLURM's queue says about a job, and how to cancel one.

It uses squeue and scancel only, as sacct needs a database that not every cluster has. So a job that ended some minutes
ago (MinJobAge of slurm.conf, 300 s by default) is unknown here; its run folder says how it ended.
"""

import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.launch.cluster.figures import moment
from tunesmith.launch.cluster.programs import run_program
from tunesmith.train.errors import ConfigError, TrainingError

# Without a controller squeue fails by itself after MessageTimeout, 5 to 14 s; without a slurm.conf after 60 s.
ANSWER_SECONDS = 30.0
JOB_ID = re.compile(r"[0-9]+([_+][0-9]+)?")
# Fixed columns: none of them holds what a user wrote, and a node list may hold any separator but a blank.
ID_WIDTH = 24
COLUMNS = {
    "State": 24,
    "Reason": 240,
    "RestartCnt": 12,
    "StartTime": 24,
    "EndTime": 24,
    "TimeLimit": 24,
    "NodeList": 4000,
}
FINAL = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


@dataclass(frozen=True)
class JobFacts:
    """A job that the queue knows."""

    state: str  # RUNNING, PENDING, COMPLETING, ..., or one of FINAL
    reason: str | None  # why it waits, or how it ended
    restarts: int
    nodes: str | None  # as SLURM writes them: n[1-2]; None without any
    start_time: float | None  # unix seconds; of a job that waits: when SLURM means to start it
    end_time: float | None  # unix seconds; of a running job: its time limit; None without one

    @property
    def is_over(self) -> bool:
        return self.state in FINAL

    @property
    def seconds_left(self) -> float | None:
        """Of the running job, until its time limit."""
        return self.end_time - time.time() if self.state == "RUNNING" and self.end_time is not None else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds_left": self.seconds_left}


def job_state(job_id: str) -> str | None:
    """The state of a job in SLURM's words; None when the queue does not know it, or no longer.

    Raises TrainingError when the controller does not answer, ConfigError where there is no SLURM.
    """
    facts = job_facts(job_id)
    return facts.state if facts else None


def job_facts(job_id: str) -> JobFacts | None:
    """What the queue says about a job; None when it does not know it, or no longer. Raises as job_state()."""
    layout = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    done = ask("squeue", "--noheader", "--states=all", f"--jobs={_checked(job_id)}", f"--Format={layout}")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise _refused("squeue", done)
    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("CLUSTER:")]
    return parse(lines[0]) if lines and not done.returncode else None


def jobs_of_script(script: Path) -> list[str]:
    """The ids of this user's jobs in the queue that run a script, oldest first. Raises as job_state()."""
    done = ask("squeue", "--me", "--noheader", "--sort=i", f"--Format=JobID:{ID_WIDTH},Command:4000")
    if done.returncode:
        raise _refused("squeue", done)
    rows = [(line[:ID_WIDTH].strip(), line[ID_WIDTH:].strip()) for line in done.stdout.splitlines()]
    return [job_id for job_id, command in rows if command == str(script)]


def parse(line: str) -> JobFacts:
    """One line of squeue, in COLUMNS, with times in unix seconds."""
    values, place = {}, 0
    for name, width in COLUMNS.items():
        values[name] = line[place : place + width].strip()
        place += width
    reason = values["Reason"]
    has_limit = values["TimeLimit"] not in ("UNLIMITED", "INVALID")  # its end is then a year away
    return JobFacts(
        state=values["State"],
        reason=reason if reason not in ("", "None") else None,
        restarts=int(values["RestartCnt"]) if values["RestartCnt"].isdecimal() else 0,
        nodes=values["NodeList"] or None,
        start_time=_time(values["StartTime"]),
        end_time=_time(values["EndTime"]) if has_limit or values["State"] in FINAL else None,
    )


def has_steps(job_id: str) -> bool:
    """Whether srun runs something in a job, which a signal would reach. Raises as job_state()."""
    done = ask("squeue", "--noheader", "--steps", f"--jobs={_checked(job_id)}", "--format=%i")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise _refused("squeue", done)
    return any(re.search(r"\.\d+$", line.strip()) for line in done.stdout.splitlines())  # not 7.batch, 7.extern


def signal_steps(job_id: str, name: str) -> None:
    """Sends a signal, such as TERM, to the ranks of a running job, not to its batch script. Raises as job_state()."""
    done = ask("scancel", f"--signal={name}", _checked(job_id))
    if done.returncode:
        raise _refused("scancel", done)


def cancel_job(job_id: str) -> None:
    """Takes a job out of the queue, or ends it where it runs; nothing where it has ended. Raises as job_state()."""
    done = ask("scancel", _checked(job_id))
    if done.returncode:
        raise _refused("scancel", done)


def _checked(job_id: str) -> str:
    """The id, once it is sure that no program takes it for an option."""
    if not JOB_ID.fullmatch(job_id):
        raise ConfigError(f"{job_id!r} is not the id of a SLURM job.", at="job_id")
    return job_id


def _time(text: str) -> float | None:
    return moment(float(text)) if text.isdecimal() else None  # N/A, NONE, Unknown


def ask(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that asks SLURM's controller, whatever its exit code. Raises as job_state()."""
    # A user's own SQUEUE_FORMAT, SQUEUE_STATES, ... would change what is printed.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SCANCEL_"))}
    try:
        return run_program([program, *arguments], kept | {"SLURM_TIME_FORMAT": "%s"}, ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise _no_answer(program, f"no answer in {ANSWER_SECONDS:g} s") from None


def _refused(program: str, done: subprocess.CompletedProcess[str]) -> TrainingError:
    lines = done.stderr.strip().splitlines()
    return _no_answer(program, lines[-1] if lines else f"exit code {done.returncode}")


def _no_answer(program: str, said: str) -> TrainingError:
    return TrainingError(
        f"SLURM does not answer: {said}.",
        at=program,
        do="try again in a minute; `scontrol ping` says whether the controller is up.",
    )
