"""What a SLURM job leaves in its run folder.

<run>/job/job.json             which job it is
<run>/job/events.jsonl         what happened to it, a line each
<run>/job/job-<id>.log         what its driver says
<run>/job/logs/<restart>/rank-<00003>.log   what each rank prints
<run>/job/stop                 somebody cancelled it: it must not requeue itself
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tunesmith.launch.cluster.job_spec import JobSpec
from tunesmith.launch.cluster.queue import JOB_ID
from tunesmith.train.errors import ConfigError
from tunesmith.train.files import durable

FOLDER = "job"
TAIL_BYTES = 2**18  # of a file with a row for each step: some hundreds of rows
RANK_LOG = re.compile(r"rank-(\d+)\.log")


@dataclass(frozen=True)
class JobFolder:
    """The job of a run; run is its run folder. job.json as it was written: what is missing there is None here."""

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
        """Those whose ranks have logs, oldest first; 0 is the first start."""
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
        return [row for row in tail_rows(self.folder / "events.jsonl") if isinstance(row.get("event"), str)]

    def own_events(self) -> list[dict[str, Any]]:
        """Those of this job: a run that failed may have been submitted once more."""
        return [row for row in self.events() if row.get("job_id") == self.job_id]

    def has_ended(self) -> bool:
        """Whether the driver has said that the job ended and will not start again."""
        turns = [event for event in self.own_events() if event["event"] in ("started", "ended")]
        return bool(turns) and turns[-1]["event"] == "ended" and turns[-1].get("then") != "requeued"


def run_folder_of(text: str) -> Path:
    """The folder of a run, or of a job that has not started yet. Raises ConfigError when it is none."""
    folder = Path(text).expanduser().absolute()
    if not (folder / "config.yaml").is_file() and not (folder / FOLDER / "job.json").is_file():
        raise ConfigError(
            f"{text!r} is not a run folder: it has neither a config.yaml nor a job/job.json.",
            at="run",
            do="give the folder that was printed when the job was submitted.",
        )
    return folder


def find_job(run: Path) -> JobFolder | None:
    """The job of a run folder; None where it was started otherwise. Raises ConfigError for a file that is not ours."""
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
        float(submitted) if isinstance(submitted, int | float) else None,
        most if isinstance(most, int) else None,
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
        "log": str(spec.run_dir / FOLDER / f"job-{job_id}.log"),
    }
    durable.write_json(spec.run_dir / FOLDER / "job.json", tree)


def make_room(folder: Path) -> None:
    """What an earlier job of this run has left there would be taken for this one's."""
    (folder / "stop").unlink(missing_ok=True)
    logs = folder / "logs"
    if logs.is_dir():
        number = 1
        while (kept := folder / f"logs-before-{number}").exists():
            number += 1
        logs.rename(kept)


def the_job(run: Path, do: str) -> JobFolder:
    """As find_job(), where there must be one. do: what to say to whom there is none. Raises ConfigError."""
    job = find_job(run)
    if job is None:
        raise ConfigError("this run has no SLURM job: it was started otherwise.", at=str(run), do=do)
    return job


def tail_rows(path: Path, max_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The last rows of a JSONL file that may be long; none without it. Torn lines are passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes))
            lines = file.read(max_bytes).split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[1:] if size > max_bytes else lines:
        with contextlib.suppress(orjson.JSONDecodeError):
            row = orjson.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows
