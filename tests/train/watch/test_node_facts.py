"""Which node is not like the others."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.train.watch import node_facts
from tunesmith.train.watch.node_facts import NodeFacts, Sick, digest_of_code, judge, look, sees


@pytest.fixture
def node(tmp_path: Path) -> NodeFacts:
    """This one."""
    nonce_file = tmp_path / "nonce"
    nonce_file.write_text("abc")
    return look(tmp_path / "runs" / "new", nonce_file, "abc", asked=1000.0, answered=1000.0)


def nodes(facts: NodeFacts, count: int, **changes: object) -> list[NodeFacts]:
    """n1, n2, ... alike, and the last one with the changes."""
    alike = [replace(facts, node=f"n{number}", clock=1000.0) for number in range(1, count + 1)]
    return [*alike[:-1], replace(alike[-1], **changes)]


def said(sick: Sequence[Sick]) -> list[str]:
    return [str(item) for item in sick]


def test_this_node_is_as_it_is_and_fits_with_itself(node: NodeFacts, tmp_path: Path) -> None:
    import torch

    assert node.versions["torch"] == torch.__version__
    assert node.python == ".".join(map(str, sys.version_info[:3]))
    assert node.free["run"] > 0
    assert node.sees_folder
    assert node.write_problem == ""
    assert NodeFacts.from_json(node.as_json()) == node
    assert judge(nodes(node, 3), gpus=None, needed_bytes=0) == []
    assert [path.name for path in tmp_path.iterdir()] == ["nonce"]  # looking leaves nothing


@pytest.mark.parametrize("text", ["[]", "{}", '{"node": "n1"}', "null"])
def test_what_is_not_a_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the facts of a node"):
        NodeFacts.from_json(text)


def test_another_version_is_named_with_the_usual_one(node: NodeFacts) -> None:
    other = {**node.versions, "transformers": "5.22.0"}
    usual = node.versions["transformers"]
    assert said(judge(nodes(node, 3, versions=other), gpus=None, needed_bytes=0)) == [
        f"node n3: it has transformers 5.22.0, the others have {usual}."
    ]
    without = {name: version for name, version in other.items() if name != "transformers"}
    assert said(judge(nodes(node, 3, versions=without), gpus=None, needed_bytes=0)) == [
        f"node n3: it has no transformers, the others have {usual}."
    ]


def test_the_majority_is_right_and_where_there_is_none_the_first_node(node: NodeFacts) -> None:
    old = replace(node, node="n1", python="3.10.1")
    new = [replace(node, node=name, python="3.11.7") for name in ("n2", "n3")]
    assert [item.node for item in judge([old, *new], gpus=None, needed_bytes=0)] == ["n1"]
    assert [item.node for item in judge([old, new[0]], gpus=None, needed_bytes=0)] == ["n2"]


def test_other_code_is_named_with_its_place(node: NodeFacts) -> None:
    [sick] = judge(nodes(node, 2, code="f" * 64, code_at="/old/tunesmith"), gpus=None, needed_bytes=0)
    assert sick.node == "n2"
    assert "/old/tunesmith" in sick.reason
    assert node.code[:12] in sick.reason


def test_the_digest_changes_with_every_file_of_code_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "conf").mkdir()
    (tmp_path / "train" / "a.py").write_text("one")
    seen = {digest_of_code(tmp_path)}
    for path, text in [("train/a.py", "two"), ("conf/b.yaml", "two"), ("train/b.py", ""), ("train/c.py", "")]:
        (tmp_path / path).write_text(text)
        seen.add(digest_of_code(tmp_path))
    assert len(seen) == 5
    (tmp_path / "train" / "note.txt").write_text("x")
    assert digest_of_code(tmp_path) in seen


@pytest.mark.parametrize(
    ("clock", "asked", "answered", "is_sick"),
    [
        (1000.0, 1000.0, 1000.0, False),
        (1004.0, 1000.0, 1000.0, False),  # within what is allowed
        (1006.0, 1000.0, 1000.0, True),
        (994.0, 1000.0, 1000.0, True),
        (1020.0, 1000.0, 1020.0, False),  # the answer took 20 s: it may have been asked late
        (1026.0, 1000.0, 1020.0, True),  # but that long ago it was not even asked
    ],
)
def test_a_clock_is_wrong_only_beyond_what_the_exchange_leaves_open(
    node: NodeFacts, clock: float, asked: float, answered: float, is_sick: bool
) -> None:
    facts = nodes(node, 2, clock=clock, asked=asked, answered=answered)
    assert [item.node for item in judge(facts, gpus=None, needed_bytes=0)] == (["n2"] if is_sick else [])


def test_the_first_nodes_own_clock_may_be_the_wrong_one(node: NodeFacts) -> None:
    facts = [replace(item, clock=1000.0 if item.node == "n1" else 1100.0) for item in nodes(node, 3)]
    assert said(judge(facts, gpus=None, needed_bytes=0)) == ["node n1: its clock is 100 s behind that of n2."]


@pytest.mark.parametrize(
    ("gpus", "given", "reason"),
    [
        (8, None, None),
        (8, 8, None),
        (7, None, "7 of 8 GPUs are seen."),
        (8, 4, "4 of 8 GPUs are seen."),
        (0, 8, "0 of 8 GPUs are seen."),  # nvidia-smi does not answer
        (None, 8, "it has no NVIDIA driver, other nodes have."),
    ],
)
def test_too_few_gpus_are_counted(node: NodeFacts, gpus: int | None, given: int | None, reason: str | None) -> None:
    facts = [replace(item, gpus=8, gpus_given=None) for item in nodes(node, 2)]
    facts[1] = replace(facts[1], gpus=gpus, gpus_given=given)
    assert said(judge(facts, gpus=8, needed_bytes=0)) == ([f"node n2: {reason}"] if reason else [])
    assert judge(facts, gpus=None, needed_bytes=0) == []


def test_gpus_are_counted_by_the_driver_and_by_what_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho 'GPU 1: H100 (UUID: b)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node_facts.gpus_of_driver() == 2
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert node_facts.gpus_of_driver() == 0
    for value, count in [("0,1,3", 3), ("", 0), ("-1", 0), ("GPU-a", 1)]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert node_facts.gpus_given() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert node_facts.gpus_given() is None


def test_a_full_disk_of_one_node_is_its_own_and_the_run_folders_is_nobodys(node: NodeFacts) -> None:
    full = nodes(node, 2, free={**node.free, "/dev/shm": 2**20})
    assert said(judge(full, gpus=None, needed_bytes=0)) == ["node n2: /dev/shm has 1 MiB free, and 32 are needed."]
    facts = [replace(item, free={**item.free, "run": 2**20}) for item in nodes(node, 3)]
    [sick] = judge(facts, gpus=None, needed_bytes=2**30, run_dir="/runs/a")
    assert (sick.node, sick.reason) == ("", "the disk of /runs/a has 1 MiB free, and 1024 are needed.")


def test_a_folder_that_one_does_not_see_is_its_mount_and_that_nobody_else_sees_is_not_shared(node: NodeFacts) -> None:
    assert said(judge(nodes(node, 3, sees_folder=False), gpus=None, needed_bytes=0, run_dir="/runs/a")) == [
        "node n3: it does not see /runs/a, which the others share."
    ]
    for count in (2, 3):
        facts = [replace(item, sees_folder=item.node == "n1") for item in nodes(node, count)]
        [sick] = judge(facts, gpus=None, needed_bytes=0, run_dir="/runs/a")
        assert sick.node == ""
        assert "not shared" in sick.reason
        assert "output_dir" in sick.do


def test_who_cannot_write_is_named_with_the_reason(node: NodeFacts) -> None:
    facts = nodes(node, 3, write_problem="Read-only file system")
    assert said(judge(facts, gpus=None, needed_bytes=0, run_dir="/runs/a")) == [
        "node n3: nothing can be written to /runs/a: Read-only file system."
    ]


def test_another_command_on_one_node_is_named_by_its_setting(node: NodeFacts) -> None:
    facts = [replace(item, settings={"seed": "0"}) for item in nodes(node, 3)]
    facts[1] = replace(facts[1], settings={"seed": "1"})
    assert said(judge(facts, gpus=None, needed_bytes=0)) == ["node n2: it has seed = 1, the others have 0."]


def test_a_nonce_of_another_folder_of_the_same_name_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "nonce").write_text("another")
    assert not sees(tmp_path / "nonce", "mine", seconds=0.2)
    assert not sees(tmp_path / "absent" / "nonce", "mine", seconds=0.2)
    (tmp_path / "nonce").write_text("mine")
    assert sees(tmp_path / "nonce", "mine", seconds=0.2)
