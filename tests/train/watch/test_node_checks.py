"""Nodes look at each other: two threads of one process are two nodes here, with a real store between them."""

import json
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from tunesmith.train.config.compose import Composed, compose_config
from tunesmith.train.errors import ConfigError
from tunesmith.train.ranks.distributed import World
from tunesmith.train.watch import node_bandwidth, node_checks
from tunesmith.train.watch.node_facts import Sick


def exchanged(tmp_path: Path, *commands: list[str]) -> list[tuple[list[str], list[Sick]]]:
    """What each of two nodes hears, of which each was started with its own overrides."""
    store, heard = dist.HashStore(), dict[int, tuple[list[str], list[Sick]]]()

    def node(rank: int, composed: Composed) -> None:
        world = World(rank, 2, 0, 1)
        heard[rank] = node_checks._exchange(composed.config, composed.resolved, world, store, tmp_path / "runs" / "new")

    threads = [
        threading.Thread(target=node, args=(rank, compose_config(["+exp=debug", *overrides])))
        for rank, overrides in enumerate(commands)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [heard[rank] for rank in range(len(commands))]


def test_nodes_that_fit_together_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    first, second = exchanged(tmp_path, ["output_dir=/a"], ["output_dir=/b"])  # rank 0's folder counts
    assert first == second
    names, sick = first
    assert len(set(names)) == 2  # though both have one host name
    assert sick == []
    assert list(tmp_path.iterdir()) == []


def test_another_command_on_the_second_node_is_refused_on_both(tmp_path: Path) -> None:
    first, second = exchanged(tmp_path, ["seed=1"], ["seed=2"])
    assert first == second
    names, [sick] = first
    assert sick.node == names[1]
    assert sick.reason == "it has seed = 2, the others have 1."


def test_a_named_node_is_written_down_for_the_scheduler_and_the_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(node_checks.SICK_NODES, str(tmp_path / "sick"))
    sick = [Sick("n2", "its clock is wrong.", "set it."), Sick("", "the folder is not shared.", "share it.")]
    node_checks._write_down(sick, World(1, 2, 0, 1))
    assert not (tmp_path / "sick").exists()  # rank 0 alone does
    node_checks._write_down(sick, World(0, 2, 0, 1))
    node_checks._write_down(sick[:1], World(0, 2, 0, 1))
    rows = [json.loads(line) for line in (tmp_path / "sick").read_text().splitlines()]
    assert rows == [{"node": "n2", "reason": "its clock is wrong."}] * 2


def test_slurm_outside_of_a_job_is_refused_with_the_way_to_submit() -> None:
    config = compose_config(["+exp=debug", "cluster=slurm"]).config
    with pytest.raises(ConfigError, match="no job of SLURM") as refused:
        node_checks.check_launch(config, World(), {})
    assert "launch/slurm.py" in str(refused.value)
    node_checks.check_launch(config, World(), {"SLURM_JOB_ID": "12"})


@pytest.mark.parametrize(
    ("overrides", "started", "is_refused"),
    [
        (["cluster=slurm", "cluster.nodes=4"], 2, True),
        (["cluster=slurm", "cluster.nodes=2"], 2, False),
        (["cluster=hostfile", "cluster.nodes=2"], 1, True),
        (["cluster=hostfile"], 2, False),  # the hostfile says how many
        (["cluster=local", "cluster.nodes=4"], 2, False),  # whatever the launcher has started
    ],
)
def test_another_number_of_nodes_than_asked_for_is_refused(
    overrides: list[str], started: int, is_refused: bool
) -> None:
    config = compose_config(["+exp=debug", *overrides]).config
    world, env = World(0, 2 * started, 0, 2), {"SLURM_JOB_ID": "12"}
    if not is_refused:
        node_checks.check_launch(config, world, env)
        return
    with pytest.raises(ConfigError, match=rf"\d nodes are asked for.* {started}\b"):
        node_checks.check_launch(config, world, env)


def test_another_number_of_ranks_on_a_node_than_asked_for_is_refused() -> None:
    config = compose_config(["+exp=debug", "cluster=slurm", "cluster.tasks_per_node=4"]).config
    env = {"SLURM_JOB_ID": "12"}
    node_checks.check_launch(config, World(0, 8, 0, 4), env)
    with pytest.raises(ConfigError, match="4 ranks are asked for on each node, and the launcher has started 2"):
        node_checks.check_launch(config, World(0, 4, 0, 2), env)


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5, 8, 33])
def test_pairs_are_mutual_and_new_in_each_round(num_nodes: int) -> None:
    met: dict[int, list[int]] = {node: [] for node in range(num_nodes)}
    for partners in node_bandwidth.rounds(num_nodes):
        for node, partner in partners.items():
            assert partners[partner] == node != partner
            met[node].append(partner)
    for node in met:
        assert len(met[node]) == len(set(met[node])) >= min(num_nodes - 2 + (num_nodes % 2 == 0), 4)


def test_the_slow_node_is_named_where_it_can_be_told() -> None:
    [sick] = node_bandwidth.slow_nodes(["n1", "n2", "n3"], [1.0, 0.9, 0.1])
    assert (sick.node, sick.reason) == ("n3", "0.1 GB/s at best with another node, the others have 0.9.")
    assert node_bandwidth.slow_nodes(["n1", "n2"], [1.0, 0.1]) == []
    assert node_bandwidth.slow_nodes(["n1", "n2", "n3"], [0.1, 0.1, 0.1]) == []
