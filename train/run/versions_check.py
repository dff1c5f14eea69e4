"""Whether the installed DeepSpeed, torch and transformers give right gradients together, before a run relies on it.

Versions that were tried are in TRIED. Any others are proven by engine_check.py, once for a user and machine: rank 0
runs it as a process of its own, on the CPU, and the others wait for what it says. What passed is kept in the user's
cache. Nodes of one run have the same versions (watch/node_checks.py), so one check is for all.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from tunesmith.train.config.config import Config
from tunesmith.train.data.cache import cache_folder
from tunesmith.train.errors import TrainingError
from tunesmith.train.files.durable import write_json
from tunesmith.train.ranks.distributed import World, broadcast_text
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.run import engine_check
from tunesmith.train.track.reporter import Reporter
from tunesmith.train.watch.node_facts import CODE, digest_of_code, versions

# What constraints.txt pins has been through `make engine-check` and all tests.
TRIED = ({"deepspeed": "0.19.8", "torch": "2.13.0", "transformers": "5.23.0"},)
COMMAND = [sys.executable, "-P", "-m", engine_check.__name__, "--quick"]
MOST_SECONDS = 300.0  # it takes about ten
WRONG = "they compute a wrong gradient"


def check_versions(config: Config, world: World, device: torch.device, reporter: Reporter) -> None:
    """Raises TrainingError, the same on every rank, where a gradient is wrong. Every rank calls it at the same time."""
    if not config.engine.check_versions:
        return
    reach(Phase.checking_engine)
    problem = broadcast_text(_problem(config, reporter) if world.rank == 0 else None, device)
    if not problem:
        return
    tried = " ".join(f"{name}=={version}" for name, version in TRIED[-1].items())
    others = f"pip install {tried}; engine.check_versions=false trains unchecked."
    by_hand = "" if problem.startswith(WRONG) else f"run {shlex.join(COMMAND)} to see why, and mend that; or "
    raise TrainingError(
        f"{_in_words(installed())} were never tried together, and {problem}.",
        at="the check of the engine on two ranks (train/run/engine_check.py)",
        do=by_hand + others,
    )


def installed() -> dict[str, str]:
    """Of the three packages, without the build (2.13.0+cu130)."""
    found = versions()
    return {name: found.get(name, "none").partition("+")[0] for name in TRIED[0]}


def _in_words(found: dict[str, str]) -> str:
    *first, last = (f"{name} {version}" for name, version in found.items())
    return f"{', '.join(first)} and {last}"


def _problem(config: Config, reporter: Reporter) -> str:
    """Empty where the versions were tried, or have passed now or before."""
    if installed() in TRIED:
        return ""
    kept = cache_folder(config.data.cache_dir) / "engine_checks" / f"{_key()}.json"
    if kept.is_file():
        return ""
    reporter.phase(
        Phase.checking_engine, words=f"checking the gradients of {_in_words(installed())}, which is done once"
    )
    problem, said = _run(min(MOST_SECONDS, 30 * config.cluster.start_timeout_minutes))
    if not problem:
        with suppress(OSError):  # the next start checks again
            kept.parent.mkdir(0o700, parents=True, exist_ok=True)
            write_json(kept, {"versions": installed(), "found": said})
    return problem


def _key() -> str:
    """Of all that the gradients depend on: packages and our own code."""
    return hashlib.sha256(json.dumps([versions(), digest_of_code(CODE)]).encode()).hexdigest()[:32]


def _run(most_seconds: float) -> tuple[str, str]:
    """The problem that the check finds, or has itself; and its last line."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(COMMAND, **pipes, text=True, start_new_session=True) as process:
        try:
            said, wrong = process.communicate(timeout=most_seconds)
        except subprocess.TimeoutExpired:
            return f"the check of their gradients was not done in {most_seconds:g} s", ""
        finally:  # it forks: its children go with it, also when this run is asked to stop
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = said.splitlines()
    if process.returncode == engine_check.WRONG:
        return f"{WRONG}: {lines[-2]}", ""
    if process.returncode:
        reason = ([line for line in wrong.splitlines() if line.strip()] or [f"exit code {process.returncode}"])[-1]
        return f"the check of their gradients failed: {' '.join(reason.split())[:300].rstrip('.')}", ""
    return "", lines[-1]
