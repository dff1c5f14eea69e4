"""From a command line to a job in SLURM's queue: composed, checked, rendered, submitted. A refusal leaves no file."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.launch.arguments import sets
from tunesmith.launch.cluster.events import sick_nodes
from tunesmith.launch.cluster.job_folder import find_job, make_room, write_job
from tunesmith.launch.cluster.job_spec import FOLDER, JobSpec
from tunesmith.launch.cluster.programs import run_program
from tunesmith.launch.cluster.queue import JOB_ID, job_facts, jobs_of_script
from tunesmith.launch.cluster.sbatch import render
from tunesmith.launch.environment import chosen
from tunesmith.launch.typed_secrets import refuse_secrets
from tunesmith.train.config.compose import Composed, compose_config
from tunesmith.train.config.config import ClusterKind
from tunesmith.train.errors import ConfigError
from tunesmith.train.files import durable, run_folder
from tunesmith.train.paths import resolve_path, user_path
from tunesmith.train.redact import names_a_secret
from tunesmith.train.zero import deepspeed_config

SUBMIT_SECONDS = 60.0  # for sbatch to answer
SCRIPT = "script.sh"
# A user's own defaults for sbatch, and where SLURM is; nothing of the job that this process may run in.
OF_SLURM = re.compile(r"SBATCH_\w+|SLURM_(CONF|CLUSTERS|TIME_FORMAT)")
UNREACHABLE = ("SLURM", "`scontrol ping` says whether the controller is up; SLURM_CONF is where its configuration is.")
REMEDIES = {
    "unable to contact": UNREACHABLE,
    "process configuration": UNREACHABLE,
    "configuration source": UNREACHABLE,
    "fetch config": UNREACHABLE,
    "invalid node name": ("cluster.exclude", "`sinfo -N` lists the nodes; <run>/job/events.jsonl names sick ones."),
    "invalid partition": ("cluster.partition", "`sinfo -s` lists the partitions."),
    "account or account/partition": ("cluster.account", "`sacctmgr show assoc user=$USER` lists your accounts."),
    "invalid account": ("cluster.account", "`sacctmgr show assoc user=$USER` lists your accounts."),
    "invalid qos": ("cluster.qos", "`sacctmgr show qos` lists them."),
    "invalid feature": ("cluster.constraint", "`sinfo -o '%P %f'` lists the features of the nodes."),
    "time limit": ("cluster.time", "`sinfo -s` lists the time limits of the partitions."),
    "node configuration": ("cluster.nodes", "`sinfo -o '%P %D %c %m %G'` lists nodes, CPUs, memory and GPUs."),
    "node count": ("cluster.nodes", "`sinfo -s` lists the nodes of each partition."),
    "reservation": ("cluster.reservation", "`scontrol show reservation` lists them."),
}


@dataclass(frozen=True)
class Submission:
    """A job as it would be submitted."""

    spec: JobSpec
    script: str
    env: dict[str, str]  # of sbatch, and so of the job
    composed: Composed


def prepare(
    overrides: Sequence[str], config_dir: Path | None, env: Mapping[str, str], run_dir: Path | None = None
) -> Submission:
    """The job of a command line. run_dir: instead of what output_dir says. Raises ConfigError; touches nothing."""
    given = list(overrides)
    if not any(sets(override, "cluster") for override in given):
        given.insert(0, "cluster=slurm")
    own = user_path(str(config_dir)).absolute() if config_dir else None
    composed = compose_config(given, own)
    config = composed.config
    cluster = config.cluster
    with composed.errors_located():
        _check_no_secret(given, cluster.env)
        if cluster.kind is not ClusterKind.slurm:
            raise ConfigError(
                f"launch/slurm.py submits runs with cluster=slurm, not {cluster.kind}.",
                key="cluster.kind",
                do="leave cluster=... out, or start the run with launch/train.py or launch/hosts.py.",
            )
        deepspeed_config.check(config, cluster.nodes * cluster.ranks_per_node)
        folder = run_dir or run_folder.choose(config)
        run_folder.check_usable(folder, config.resume.source)
        spec = JobSpec(
            run_dir=folder,
            overrides=[item for item in given if not sets(item, "output_dir")],
            config_dir=own,
            nodes=cluster.nodes,
            ranks_per_node=cluster.ranks_per_node,
            gpus_per_node=cluster.gpus_per_node,
            cpus_per_task=cluster.cpus_per_task,
            cpu_bind=cluster.cpu_bind,
            exclude=(*cluster.exclude, *sorted(sick_nodes(folder / FOLDER))),
            preflight=cluster.preflight,
            max_restarts=cluster.max_restarts,
            no_progress=cluster.no_progress,
            container=cluster.container and resolve_path(cluster.container),
            container_runtime=cluster.container_runtime.value,
            container_mounts=tuple(map(resolve_path, cluster.container_mounts)),
            container_python=cluster.container_python,
        )
        script = render(spec, cluster, config.name)
    kept = {name: value for name, value in env.items() if OF_SLURM.fullmatch(name)}
    return Submission(spec, script, kept | chosen(cluster.env, env), composed)


def submit(overrides: Sequence[str], run_dir: Path | None = None, config_dir: Path | None = None) -> str:
    """Submits a run and returns the id of its job. Raises ConfigError when it is refused, and leaves no file then."""
    return send(prepare(overrides, config_dir, os.environ, run_dir))


def send(submission: Submission) -> str:
    """As submit(), of a submission."""
    run_dir, folder = submission.spec.run_dir, submission.spec.job_dir
    above = _first_missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(run_dir):
            _check_free(run_dir)
            ask_slurm(submission)  # before anything of an earlier job is touched
            return _submit_script(submission, folder)
    except OSError as error:
        _remove(above)
        raise ConfigError(
            f"the run folder cannot be written: {error.strerror}.", at=str(folder), do="choose another output_dir."
        ) from None
    except ConfigError as error:
        if not isinstance(error, Unanswered):
            _remove(above)
        raise


class Unanswered(ConfigError):
    """sbatch did not answer, so there may or may not be a job."""


@contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Raises ConfigError while another submission of the run is under way; blocks signals until it is done."""
    lock = FileLock(run_dir / f"{run_folder.HIDDEN_PREFIX}submit")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            "another submission of this run is under way.",
            at=str(run_dir),
            do="wait until it is done, then look at the status.",
        ) from None
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        lock.release()
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)


def _submit_script(submission: Submission, folder: Path) -> str:
    make_room(folder)
    script = folder / SCRIPT
    durable.write_bytes(script, submission.script.encode(errors="surrogateescape"))
    submitted = time.time()
    try:
        job_id = _sbatch(["--parsable", str(script)], submission.env).partition(";")[0]
    except Unanswered:
        found = jobs_of_script(script)  # sbatch may have submitted it before it hung
        if not found:
            raise
        job_id = found[-1]
    if not JOB_ID.fullmatch(job_id):
        raise ConfigError(f"sbatch gave no job id, but {job_id[:80]!r}.", at="sbatch", do="correct cluster.sbatch.")
    write_job(submission.spec, job_id, submitted)
    return job_id


def ask_slurm(submission: Submission) -> str:
    """SLURM's own answer to whether it would take the script, as a comment. Raises ConfigError when it would not."""
    if shutil.which("sbatch") is None:
        return "# not asked: there is no SLURM on this machine"
    with tempfile.TemporaryDirectory(prefix="tunesmith-script-") as folder:
        script = Path(folder, "script.sh")
        script.write_bytes(submission.script.encode(errors="surrogateescape"))
        return f"# {_sbatch(['--test-only', str(script)], submission.env)}"


def _check_free(run_dir: Path) -> None:
    """Raises ConfigError while a job of this run is in the queue: two would write into one folder.

    A job whose submission was killed before job.json was written is found by its script.
    """
    job = find_job(run_dir)
    known = [job.job_id] if job else []
    script = run_dir / FOLDER / SCRIPT
    for job_id in [*known, *(jobs_of_script(script) if script.exists() else [])]:
        facts = job_facts(job_id)
        if facts and not facts.is_over:
            raise ConfigError(
                f"job {job_id} of this run is {facts.state} already.",
                at=str(run_dir),
                do=f"wait for it, cancel it with `scancel {job_id}`, or choose another output_dir.",
            )


def _check_no_secret(overrides: Sequence[str], env: Sequence[str]) -> None:
    """Raises ConfigError for a secret that was typed: a job's script and command lines are seen by others."""
    for name, equals, _ in (item.partition("=") for item in env):
        if equals and names_a_secret(name):
            raise ConfigError(
                f"{name} holds a secret, which would be seen in files and command lines.",
                at="an entry of cluster.env",
                do=f"export {name} in your shell, and list its name alone.",
            )
    refuse_secrets(overrides, "command line", what="a job's script")


def _first_missing(folder: Path) -> Path | None:
    """The topmost of the folders that have to be made for this one."""
    missing = None
    while not folder.exists():
        missing, folder = folder, folder.parent
    return missing


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _sbatch(arguments: Sequence[str], env: Mapping[str, str]) -> str:
    """What sbatch prints. Raises ConfigError with what it says, in one line."""
    do = "run this on a login node of the cluster; --dry-run prints the script anywhere."
    try:
        done = run_program(["sbatch", *arguments], env, SUBMIT_SECONDS, do=do)
    except subprocess.TimeoutExpired:
        raise Unanswered(
            f"sbatch did not answer in {SUBMIT_SECONDS:g} s.",
            at="sbatch",
            do="`scontrol ping` says what is wrong, and `squeue --me` whether the job is in the queue.",
        ) from None
    if done.returncode:
        raise _refused(done.stderr)
    return done.stdout.strip() or " ".join(done.stderr.split())  # --test-only prints to stderr


def _refused(said: str) -> ConfigError:
    lines = [re.sub(r"^(sbatch: )?(error: )?", "", line).strip() for line in said.splitlines()]
    words = " ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"
    known = (pair for text, pair in REMEDIES.items() if text in words.lower())
    key, do = next(known, ("sbatch", "correct cluster.*; --dry-run prints the script."))
    return ConfigError(f"SLURM refuses the job: {words[:300].rstrip('.')}.", at=key, do=do)
