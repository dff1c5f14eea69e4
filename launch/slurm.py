"""Trains on a SLURM cluster: one command from a login node, and a job that requeues itself until the run is done.

    python launch/slurm.py +exp=support_bot_full_8b_8xh100 cluster.nodes=4 key=value ...    submits the run
    python launch/slurm.py --dry-run +exp=... ...    prints the script, and asks SLURM whether it would take it
    python launch/slurm.py status [--json] <run>     state, step, tokens/s, time left, what went wrong
    python launch/slurm.py logs [-f] [--rank N] <run>    what its ranks print
    python launch/slurm.py cancel [--save] <run>     ends it; --save: once its ranks have saved

cluster=slurm is implied. docs/cluster.md leads from a login node to a running job.

Options:
    --config-dir <folder>  search your own yaml files too: <folder>/cluster/mine.yaml is cluster=mine
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tunesmith.launch.arguments import main, show_help, take_option
from tunesmith.train.printable import printable


def slurm(arguments: list[str]) -> None:
    """Raises ConfigError, TrainingError."""
    verbs = _verbs() if arguments and arguments[0] in ("status", "logs", "cancel") else {}
    if verbs:
        verbs[arguments[0]](arguments[1:])
    elif not show_help(arguments or ["--help"], __doc__):
        _submit(arguments)


def _verbs() -> dict[str, Callable[[list[str]], None]]:
    from tunesmith.launch.cluster.cancel import cancel
    from tunesmith.launch.cluster.logs import logs
    from tunesmith.launch.cluster.status import status

    return {"status": status, "logs": logs, "cancel": cancel}


def _submit(arguments: list[str]) -> None:
    from tunesmith.launch.cluster.submit import ask_slurm, prepare, send

    config_dir, rest = take_option(arguments, "--config-dir")
    overrides = [argument for argument in rest if argument != "--dry-run"]
    submission = prepare(overrides, Path(config_dir) if config_dir else None, os.environ)
    if "--dry-run" in rest:
        sys.stdout.buffer.write(submission.script.encode(errors="surrogateescape"))
        sys.stdout.flush()
        sys.stderr.write(f"{printable(ask_slurm(submission))}\n")
        return
    job_id = send(submission)
    run = shlex.quote(str(submission.spec.run_dir))
    sys.stdout.write(
        f"job {job_id} is submitted: {submission.spec.nodes} node(s) x {submission.spec.ranks_per_node} rank(s)\n"
        f"  run:    {submission.spec.run_dir}\n"
        f"  status: python launch/slurm.py status {run}\n"
        f"  logs:   python launch/slurm.py logs -f {run}\n"
    )


if __name__ == "__main__":
    main(slurm)
