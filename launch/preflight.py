"""Checks a node before ranks start there: one task on each node of a job.

    srun --ntasks-per-node=1 python -m tunesmith.launch.preflight --out <folder> --run-dir <run> --nonce <text>

It writes <folder>/<node>.json, whole or not at all, and prints the same as one line, so that a node that does not share
the folder is heard too. The driver on the first node calls begin() before, and sick_nodes() after it.
"""

import argparse
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.train.watch.node_facts import SHARE, NodeFacts, Sick, judge, look

NONCE, BEGAN = "nonce", "began"
REPORT = "preflight-report "  # the beginning of the line that a node prints


def begin(out: Path) -> str:
    """On the first node: makes the folder of the reports, with a nonce that the nodes must see; returns the nonce."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):
        old.unlink()
    nonce = secrets.token_hex(8)
    _write(out / NONCE, nonce)
    _write(out / BEGAN, repr(time.time()))
    return nonce


def command(out: Path, run_dir: Path, nonce: str) -> list[str]:
    """The command that srun starts once on each node."""
    module = "tunesmith.launch.preflight"
    return [sys.executable, "-P", "-m", module, "--out", str(out), "--run-dir", str(run_dir), "--nonce", nonce]


def report(out: Path, run_dir: Path, nonce: str) -> bool:
    """Reports on this node; False when the report could not be written into the folder."""
    facts = look(run_dir, out / NONCE, nonce)
    sys.stdout.write(f"{REPORT}{facts.as_json()}\n")
    sys.stdout.flush()
    if not facts.sees_folder:
        sys.stderr.write(f"{facts.node}: {out / NONCE}, which the first node has written, cannot be seen here\n")
        return False
    try:
        _write(out / f"{facts.node}.json", facts.as_json())
    except OSError as error:
        sys.stderr.write(f"{facts.node}: the report cannot be written to {out}: {error.strerror}\n")
        return False
    return True


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def sick_nodes(out: Path, nodes: Sequence[str], *, gpus: int | None, said: str = "") -> list[Sick]:
    """The nodes that must not train, and why. Called on the first node, as soon as the step has ended.

    Sick.node is empty where it is not the fault of one node: the run folder is not shared, or its disk is full.

    Args:
        nodes: as the scheduler names them, the first one first.
        gpus: each node must have at least so many; None: any number.
        said: the output of the step.
    """
    began, ended = float((out / BEGAN).read_text(encoding="utf-8")), time.time()
    found = {facts.node: facts for facts in printed(said)} | {facts.node: facts for facts in _written(out, nodes)}
    silent = [node for node in nodes if node not in found]
    if silent and len(silent) == len(nodes) - 1 > 1 and nodes[0] not in silent:
        return [Sick("", f"only {nodes[0]} has left its report in {out}: the folder is not shared.", SHARE)]
    answers = [replace(found[node], asked=began, answered=ended) for node in nodes if node in found]
    sick = [Sick(node, f"it did not answer: its report is not in {out}.", ANSWER) for node in silent]
    return sick + (judge(answers, gpus=gpus, run_dir=str(out.parent.parent)) if answers else [])


ANSWER = (
    "see what the step printed; the node may be down, without this Python or code, or without the shared run folder."
)


def _written(out: Path, nodes: Sequence[str]) -> list[NodeFacts]:
    found = []
    for node in nodes:
        try:
            found.append(NodeFacts.from_json((out / f"{node}.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
    return found


def printed(said: str) -> list[NodeFacts]:
    """The reports in the output of the tasks."""
    found = []
    for line in said.splitlines():
        _, begins, text = line.partition(REPORT)
        if begins:
            try:
                found.append(NodeFacts.from_json(text))
            except (ValueError, TypeError):
                continue
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Checks this node before ranks start on it.")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the reports")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run folder, which need not be there yet")
    parser.add_argument("--nonce", required=True, help="what the first node has written to OUT/nonce")
    given = parser.parse_args(arguments)
    return 0 if report(given.out, given.run_dir, given.nonce) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
