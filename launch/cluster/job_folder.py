"""What a SLURM job leaves in its run folder.

<run>/job/job.json             which job it is
<run>/job/events.jsonl         what happened to it, one line each
<run>/job/job-<id>.log         the driver's log
<run>/job/logs/<restart>/rank-<00003>.log   what each rank prints
<run>/job/stop                 it was cancelled, and must not requeue itself
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tunesmith.launch.cluster.events import events_of
from tunesmith.launch.cluster.figures import count, moment
from tunesmith.launch.cluster.job_spec import FOLDER, JobSpec
from tunesmith.launch.cluster.queue import JOB_ID
from tunesmith.train.errors import ConfigError
from tunesmith.train.files import durable
from tunesmith.train.paths import user_path

RANK_LOG = re.compile(r"rank-(\d+)\.log")


@dataclass(frozen=True)
class JobFolder:
    """The job of the run in the folder `run`. What job.json does not say is None here."""

    run: Path
    job_id: str
    submitted: float | None = None  # unix seconds
    max_restarts: int | None = None

    @property
    def folder(self) -> Path:
        return self.run / FOLDER

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    @property
    def driver_log(self) -> Path:
        return self.folder / f"job-{self.job_id}.log"

    def restarts(self) -> list[int]:
        """The restarts whose ranks have logs, oldest first; 0 is the first start."""
        folder = self.folder / "logs"
        names = [path.name for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
        return [number for number in sorted(map(int, names)) if self.rank_logs(number)]

    def rank_logs(self, restart: int) -> dict[int, Path]:
        """rank -> its log, by rank."""
        folder = self.folder / "logs" / str(restart)
        found = [(RANK_LOG.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def events(self) -> list[dict[str, Any]]:
        """The last ones, oldest first: some hundreds. Those of earlier jobs of the same run are among them."""
        return events_of(self.folder)

    def own_events(self) -> list[dict[str, Any]]:
        """The events of this job alone: a run that failed may have been submitted again."""
        return [row for row in self.events() if row.get("job_id") == self.job_id]

    def last_turn(self) -> dict[str, Any] | None:
        """The newest start or end of this job; None before the first start."""
        turns = [event for event in self.own_events() if event["event"] in ("started", "ended")]
        return turns[-1] if turns else None

    def has_ended(self) -> bool:
        """Whether the driver wrote that the job ended and will not start again."""
        last = self.last_turn()
        return last is not None and last["event"] == "ended" and last.get("then") != "requeued"


def run_folder_of(text: str) -> Path:
    """The folder of a run, or of a job that has not started yet. Raises ConfigError when it is none."""
    folder = user_path(text).absolute()
    if not (folder / "config.yaml").is_file() and not (folder / FOLDER / "job.json").is_file():
        raise ConfigError(
            f"{text!r} is not a run folder: it has neither a config.yaml nor a job/job.json.",
            at="run",
            do="give the folder that was printed when the job was submitted.",
        )
    return folder


def find_job(run: Path) -> JobFolder | None:
    """The job of a run folder; None where SLURM did not start the run. Raises ConfigError for a damaged job.json."""
    file = run / FOLDER / "job.json"
    try:
        tree = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(
            f"the job's file cannot be read: {error}.",
            at=str(file),
            do="remove it; `squeue --me` lists your jobs.",
        ) from None
    job_id = tree.get("job_id") if isinstance(tree, dict) else None
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        raise ConfigError(
            f"job_id={job_id!r} is not the id of a SLURM job.",
            at=str(file),
            do="remove it; `squeue --me` lists your jobs.",
        )
    submitted, most = tree.get("submitted"), tree.get("max_restarts")
    return JobFolder(
        run,
        job_id,
        moment(submitted),
        count(most),
    )


def write_job(spec: JobSpec, job_id: str, submitted: float) -> None:
    """job.json, by which status, logs and cancel find the job. Raises OSError."""
    tree = {
        "job_id": job_id,
        "submitted": submitted,
        "command": spec.overrides,
        "nodes": spec.nodes,
        "ranks_per_node": spec.ranks_per_node,
        "max_restarts": spec.max_restarts,
        "log": str(spec.job_dir / f"job-{job_id}.log"),
    }
    durable.write_json(spec.job_dir / "job.json", tree)


def make_room(folder: Path) -> None:
    """Moves away what an earlier job of this run has left, which would look like this one's."""
    (folder / "stop").unlink(missing_ok=True)
    logs = folder / "logs"
    if logs.is_dir():
        number = 1
        while (kept := folder / f"logs-before-{number}").exists():
            number += 1
        logs.rename(kept)


def the_job(run: Path, do: str) -> JobFolder:
    """As find_job(), but raises ConfigError, with the remedy `do`, where there is none."""
    job = find_job(run)
    if job is None:
        raise ConfigError("this run has no SLURM job: it was started otherwise.", at=str(run), do=do)
    return job
