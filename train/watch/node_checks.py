"""The nodes of a run look at each other once their ranks have met, before anything is loaded.

The first rank of each node tells rank 0 through the store what its node is like; rank 0 judges, and all ranks raise the
same error. Then the network between them is timed (node_bandwidth.py).
"""

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tunesmith.train.config.config import ClusterKind, Config
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.ranks.rendezvous import interruptible
from tunesmith.train.redact import redact
from tunesmith.train.watch import node_bandwidth
from tunesmith.train.watch.node_facts import SICK_NODES, NodeFacts, Sick, existing, judge, look

KEYS = "tunesmith/nodes"
NAMED = 3  # nodes in one line of an error


def check_launch(config: Config, world: World, env: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError when the launcher that started this rank is not the one that cluster.kind speaks of."""
    cluster = config.cluster
    if cluster.kind is ClusterKind.slurm and "SLURM_JOB_ID" not in env:
        raise ConfigError(
            "this is no job of SLURM.",
            key="cluster.kind",
            do="submit it: python launch/slurm.py with the same overrides; or train on this machine: cluster=local.",
        )
    if cluster.kind is not ClusterKind.local and cluster.nodes > 1 and cluster.nodes != world.num_nodes:
        raise ConfigError(
            f"{cluster.nodes} nodes are asked for, and the launcher has started ranks on {world.num_nodes}.",
            key="cluster.nodes",
            do=f"set cluster.nodes={world.num_nodes}, or start ranks on {cluster.nodes} nodes.",
        )
    if cluster.kind is not ClusterKind.local and cluster.tasks_per_node not in (None, world.local_world_size):
        raise ConfigError(
            f"{cluster.tasks_per_node} ranks are asked for on each node, and the launcher has started "
            f"{world.local_world_size}.",
            key="cluster.tasks_per_node",
            do=f"set cluster.tasks_per_node={world.local_world_size}, or have the launcher start as many.",
        )


def check_nodes(
    config: Config, resolved: dict[str, Any], world: World, device: torch.device, store: dist.Store, run_dir: Path
) -> list[tuple[str, str]]:
    """Makes sure that the nodes fit together; every rank calls it at the same time.

    Returns: rows for the table of the start; none on a single node, or with cluster.preflight=false.
    Raises: TrainingError, the same on every rank, that names the node and the remedy.
    """
    if world.num_nodes < 2 or not config.cluster.preflight:
        return []
    reach(Phase.checking_nodes)
    names, sick = interruptible(lambda: _exchange(config, resolved, world, store, run_dir))
    if sick:
        _write_down(sick, world)
        raise TrainingError(_in_one_line(sick), at=f"the check of {len(names)} nodes", do=sick[0].do)
    speed = node_bandwidth.of_all_reduce(world, device)
    row = ("nodes", f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; {speed}")
    wanted = config.cluster.min_bandwidth_gbps
    if wanted is None or speed.gigabytes_per_second >= wanted:
        return [row]
    slow = node_bandwidth.slow_nodes(names, node_bandwidth.of_pairs(world, device))
    _write_down(slow, world)
    culprit = f" {_in_one_line(slow)}" if slow else ""
    raise TrainingError(
        f"the network is slow: {speed}, and {wanted:g} are asked for.{culprit}",
        at="cluster.min_bandwidth_gbps",
        do="leave the slow node out." if slow else "see that NCCL or gloo uses the fast network (NCCL_DEBUG=INFO).",
    )


def _exchange(
    config: Config, resolved: dict[str, Any], world: World, store: dist.Store, run_dir: Path
) -> tuple[list[str], list[Sick]]:
    """Names of all nodes, and the sick ones; the same on every rank."""
    keys = f"{KEYS}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # torchrun's store outlives the ranks
    if world.rank == 0:
        facts = _facts_of_all(world, store, keys, run_dir, _settings(resolved))
        sick = judge(facts, gpus=None, run_dir=str(run_dir))
        verdict = {"names": [item.node for item in facts], "sick": [asdict(item) for item in sick]}
        store.set(f"{keys}/verdict", json.dumps(verdict))
    elif world.local_rank == 0:
        _tell(world, store, keys, run_dir, _settings(resolved))
    verdict = json.loads(store.get(f"{keys}/verdict"))
    return verdict["names"], [Sick(**item) for item in verdict["sick"]]


def _facts_of_all(
    world: World, store: dist.Store, keys: str, run_dir: Path, settings: dict[str, str]
) -> list[NodeFacts]:
    """Rank 0 asks the other nodes: first for their clocks, one by one, then for all else, which takes longer."""
    nonce = secrets.token_hex(8)
    nonce_file = existing(run_dir) / f".tunesmith-nonce-{nonce}"  # a name that makes no folder look used
    nonce_file.write_text(nonce, encoding="utf-8")
    try:
        store.set(f"{keys}/nonce", json.dumps([str(nonce_file), nonce]))
        times = {}
        for node in range(1, world.num_nodes):
            store.get(f"{keys}/here/{node}")
            asked = time.time()
            store.set(f"{keys}/ask/{node}", "")
            times[node] = (float(store.get(f"{keys}/clock/{node}")), asked, time.time())
        own = look(run_dir, nonce_file, nonce)
        facts = [replace(own, asked=own.clock, answered=own.clock, settings=settings)]
        for node, (clock, asked, answered) in times.items():
            told = NodeFacts.from_json(store.get(f"{keys}/facts/{node}"))
            facts.append(replace(told, clock=clock, asked=asked, answered=answered))
    finally:
        nonce_file.unlink(missing_ok=True)
    return _with_own_names(facts)


def _tell(world: World, store: dist.Store, keys: str, run_dir: Path, settings: dict[str, str]) -> None:
    """What the first rank of another node does meanwhile."""
    nonce_file, nonce = json.loads(store.get(f"{keys}/nonce"))
    store.set(f"{keys}/here/{world.node_rank}", "")
    store.get(f"{keys}/ask/{world.node_rank}")
    store.set(f"{keys}/clock/{world.node_rank}", repr(time.time()))
    facts = replace(look(run_dir, Path(nonce_file), nonce), settings=settings)
    store.set(f"{keys}/facts/{world.node_rank}", facts.as_json())


def _with_own_names(facts: Sequence[NodeFacts]) -> list[NodeFacts]:
    """Containers may all have one host name: then the number of the node is added."""
    names = [item.node for item in facts]
    if len(set(names)) == len(names):
        return list(facts)
    return [replace(item, node=f"{item.node} (node {number})") for number, item in enumerate(facts)]


def _settings(resolved: dict[str, Any]) -> dict[str, str]:
    """What has to be the same in the commands of all nodes; a path may differ where nodes have disks of their own."""
    flat: dict[str, str] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif "/" not in str(value):
                flat[f"{prefix}{key}"] = str(value)

    walk(redact(resolved), "")
    flat.pop("output_dir", None)  # rank 0's counts
    return flat


def _in_one_line(sick: Sequence[Sick]) -> str:
    more = f" And {len(sick) - NAMED} more nodes." if len(sick) > NAMED else ""
    return " ".join(str(item) for item in sick[:NAMED]) + more


def _write_down(sick: Sequence[Sick], world: World) -> None:
    """For who starts the next attempt: launch/slurm.py leaves these nodes out."""
    path = os.environ.get(SICK_NODES)
    if path and world.rank == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps({'node': item.node, 'reason': item.reason})}\n" for item in sick if item.node)
