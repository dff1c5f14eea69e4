"""The look at a node before its ranks start."""

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.launch import preflight
from tunesmith.train.watch.node_facts import NodeFacts


def run(out: Path, nonce: str, node: str) -> "subprocess.CompletedProcess[str]":
    """The step's task on a node of this name."""
    command = ["env", f"SLURMD_NODENAME={node}", *preflight.command(out, out.parents[1], nonce)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reports of n1 and n2."""
    out = tmp_path_factory.mktemp("run") / "job" / "preflight"
    nonce = preflight.begin(out)
    for node in ("n1", "n2"):
        done = run(out, nonce, node)
        assert (done.returncode, done.stderr) == (0, "")
    return out


def test_healthy_nodes_pass_and_leave_whole_reports(looked: Path) -> None:
    assert preflight.sick_nodes(looked, ["n1", "n2"], gpus=None) == []
    assert sorted(path.name for path in looked.iterdir()) == ["began", "n1.json", "n2.json", "nonce"]


def test_it_is_light(looked: Path) -> None:
    code = "import sys, tunesmith.launch.preflight; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    assert (
        subprocess.run([*preflight.command(looked, looked, "")[:1], "-c", code], timeout=60, check=False).returncode
        == 0
    )


def test_a_node_that_left_no_report_is_named(looked: Path) -> None:
    [sick] = preflight.sick_nodes(looked, ["n1", "n2", "n3"], gpus=None)
    assert sick.node == "n3"
    assert "did not answer" in sick.reason


def test_too_few_gpus_are_named(looked: Path) -> None:
    sick = preflight.sick_nodes(looked, ["n1", "n2"], gpus=1000)
    assert [item.node for item in sick] == ["n1", "n2"]


def test_a_report_that_is_cut_off_is_none(tmp_path: Path, looked: Path) -> None:
    out = tmp_path / "job" / "preflight"
    preflight.begin(out)
    (out / "n1.json").write_bytes((looked / "n1.json").read_bytes())
    (out / "n2.json").write_bytes((looked / "n2.json").read_bytes()[:-9])
    assert [item.node for item in preflight.sick_nodes(out, ["n1", "n2"], gpus=None)] == ["n2"]


def test_a_folder_that_only_the_first_node_sees_is_not_shared(tmp_path: Path, looked: Path) -> None:
    mine, theirs = tmp_path / "n1" / "job" / "preflight", tmp_path / "n2" / "job" / "preflight"
    nonce = preflight.begin(mine)
    assert run(mine, nonce, "n1").returncode == 0
    facts = NodeFacts.from_json((looked / "n2.json").read_text())
    said = f"1: srun: warning\n{preflight.REPORT}{replace(facts, sees_folder=False).as_json()}\n"
    [sick] = preflight.sick_nodes(mine, ["n1", "n2"], gpus=None, said=said)
    assert sick.node == ""  # no node's fault
    assert f"{tmp_path / 'n1'} is not shared" in sick.reason
    assert not theirs.exists()
    # Without what the step has printed, of more than two nodes:
    [sick] = preflight.sick_nodes(mine, ["n1", "n2", "n3"], gpus=None)
    assert sick.node == ""
    assert "not shared" in sick.reason


@pytest.mark.slow  # a network file system gets its time
def test_a_node_without_the_folder_says_so_and_makes_none(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "job" / "preflight"
    done = run(out, "abc", "n2")
    assert done.returncode == 1
    assert "n2" in done.stderr
    assert preflight.printed(done.stdout)[0].sees_folder is False
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_ahead_is_named(tmp_path: Path, looked: Path) -> None:
    out = tmp_path / "job" / "preflight"
    preflight.begin(out)
    facts = NodeFacts.from_json((looked / "n1.json").read_text())
    for node, ahead in [("n1", 0.0), ("n2", 60.0), ("n3", 0.0)]:
        (out / f"{node}.json").write_text(replace(facts, node=node, clock=time.time() + ahead).as_json())
    [sick] = preflight.sick_nodes(out, ["n1", "n2", "n3"], gpus=None)
    assert sick.node == "n2"
    assert "60 s ahead" in sick.reason
