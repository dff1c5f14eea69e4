"""The script of a job: sbatch's directives and one command, with everything quoted that a shell could read."""

import re
import shlex
import sys
from pathlib import Path

from tunesmith.launch.cluster.job_spec import JobSpec
from tunesmith.train.config.config import ClusterConfig
from tunesmith.train.errors import ConfigError
from tunesmith.train.redact import names_a_secret

PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,=\[\]()&|*-]+")  # what sbatch reads as it is, without quotes
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
DRIVER = "tunesmith.launch.cluster.job"
MAX_LINE = 900  # characters of a directive; sbatch reads lines of 1024


def render(spec: JobSpec, cluster: ClusterConfig, name: str) -> str:
    """The text of the script. Raises ConfigError for a name or folder that no directive of sbatch can hold."""
    lines = ["#!/bin/bash -l" if cluster.modules else "#!/bin/bash"]
    lines += [f"# One run of Tunesmith; `launch/slurm.py status|logs|cancel {_comment(spec.run_dir)}` looks after it."]
    lines += [f"# By hand: mkdir -p {_comment(spec.job_dir)} && sbatch <this script>"]
    lines += ["# shellcheck disable=SC1003,SC2016  # a quote or $ in a text means itself"]
    lines += [f"#SBATCH {option}" for option in directives(spec, cluster, name)]
    lines += ["set -euo pipefail", *(f"module load {shlex.quote(module)}" for module in cluster.modules)]
    lines += [f"export {name}={quoted(value)}" for name, value in _assigned(cluster)]
    lines += [_command([sys.executable, "-P", "-m", DRIVER], spec.arguments())]
    return "\n".join(lines) + "\n"


def directives(spec: JobSpec, cluster: ClusterConfig, name: str) -> list[str]:
    """The options of sbatch, one directive each."""
    log = str(spec.job_dir / "job-").replace("%", "%%") + "%j.log"
    options: dict[str, str | int | None] = {
        "job-name": name,
        "output": log,
        "chdir": str(Path.cwd()),  # where relative paths of the overrides start
        "nodes": spec.nodes,
        "ntasks-per-node": spec.ranks_per_node,
        "gpus-per-node": spec.gpus_per_node,
        "cpus-per-task": spec.cpus_per_task,
        "mem": cluster.memory,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": ",".join(spec.exclude) or None,
        "signal": f"USR1@{cluster.signal_seconds}",  # to the ranks, which save
        "open-mode": "append",
    }
    listed = [f"--{option}={_value(option, value)}" for option, value in options.items() if value is not None]
    return [*listed, "--requeue", *cluster.sbatch]


def _value(option: str, value: str | int) -> str:
    text = str(value)
    if PLAIN.fullmatch(text) and len(text) <= MAX_LINE:
        return text
    key = {"job-name": "name", "output": "output_dir", "chdir": "the current folder"}.get(option, f"cluster.{option}")
    if not text.isprintable() or "\\" in text or len(text) > MAX_LINE:  # a backslash in a path of a log has a meaning
        raise ConfigError(
            f"{text!r} cannot be written in a script of sbatch.",
            key=key,
            do=f"leave out backslashes and control characters, and keep it below {MAX_LINE} characters.",
        )
    return '"' + text.replace('"', '\\"') + '"'


def _assigned(cluster: ClusterConfig) -> list[tuple[str, str]]:
    """NAME=value of cluster.env; secrets reach the job through the environment of sbatch alone."""
    pairs = [item.partition("=") for item in cluster.env if "=" in item]
    return [(name, value) for name, _, value in pairs if not names_a_secret(name)]


def _command(program: list[str], arguments: list[str]) -> str:
    return " \\\n    ".join([f"exec {' '.join(map(quoted, program))}", *map(quoted, arguments)])


def quoted(text: str) -> str:
    """One word for bash, whatever is in it: control characters as escapes, so that no line of the script is broken."""
    if not CONTROL.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", escaped) + "'"


def _comment(path: Path) -> str:
    """A path in a comment, which no line break can end."""
    return CONTROL.sub("?", shlex.quote(str(path)))
