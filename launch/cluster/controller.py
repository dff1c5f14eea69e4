"""What a running job asks of SLURM's controller: its nodes, its own state, and to be started again."""

import re
import subprocess
import sys
from collections.abc import Sequence

from tunesmith.launch.cluster.queue import ask
from tunesmith.train.errors import TrainingError
from tunesmith.train.printable import printable

BAD_STATE = re.compile(r"DOWN|FAIL|NOT_RESPONDING|DRAIN|POWER|UNKNOWN|ERROR|INVAL")
BY_WHOM = re.compile(r"\s*\[\S+@\S+\]$")  # who set the state, and when
FIELD = re.compile(r"^\s*(State|Reason)=(.*?)(?:\s+[A-Z][A-Za-z]+=.*)?$", re.MULTILINE)


def host_names(nodes: str) -> list[str]:
    """n[1-2] as n1 and n2, in SLURM's order."""
    return _scontrol("show", "hostnames", nodes).stdout.split()


def unhealthy_nodes(nodes: Sequence[str]) -> dict[str, str]:
    """The nodes that the controller reports as unhealthy: node -> its state and why. Empty when it does not answer."""
    found = {}
    for node in nodes:
        fields = dict(FIELD.findall(_scontrol("show", "node", node).stdout))
        if BAD_STATE.search(fields.get("State", "")):
            reason = BY_WHOM.sub("", fields.get("Reason", "").strip())
            found[node] = f"{fields['State'].strip()}{f' ({reason})' if reason else ''}"
    return found


def requeue(job_id: str, exclude: Sequence[str]) -> str:
    """Puts this job back into the queue, without some nodes. Returns why SLURM refuses; empty when it does not.

    The controller sends SIGTERM to this job's processes at once: the second command must not get it.
    """
    done = _scontrol("requeue", job_id)
    if done.returncode:
        return " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    done = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={','.join(exclude)}")  # an empty list clears it
    if done.returncode:
        sys.stdout.write(
            f"job: SLURM does not exclude {', '.join(exclude)}: {printable(' '.join(done.stderr.split()))}\n"
        )
    return ""


def is_unreachable(problem: str) -> bool:
    """Whether the problem is that SLURM's controller cannot be reached."""
    return bool(re.search(r"no answer|Unable to contact|timed out|Connection refused|Zero Bytes", problem))


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Its answer; a controller that does not answer counts as exit code 1."""
    try:
        return ask("scontrol", *arguments)
    except TrainingError as silent:
        return subprocess.CompletedProcess(["scontrol", *arguments], 1, "", silent.what)
