"""A run that has finished: the same command says so, and one with other settings is refused by name."""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tunesmith.train.config.override_text import typed
from tunesmith.train.run.summary import end_rows

ROWS = '{"prompt": "How do I log in?", "completion": "With your e-mail."}\n'
FOLDER = "l'été (1), a=b [2] $HOME"  # as people call them
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
DATA = (f"data.train={FOLDER}/données (1).jsonl", f"data.cache_dir={FOLDER}/~cache", "data.validation=[]")
SMALL = ("+exp=debug", "evaluate.every_steps=null", "evaluate.generate=false", "batch.sequence_length=128")
SETTINGS = (*SMALL, *DATA, "schedule.max_steps=1")
NO_CHECKPOINT = ("adapter=lora", "adapter.r=2", "checkpoint.every_steps=null", "checkpoint.at_end=false")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def again(command: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """again(*overrides) starts the command of a finished adapter run without checkpoints, with further overrides."""
    root = tmp_path_factory.mktemp("finished")
    (root / FOLDER).mkdir()
    (root / FOLDER / "données (1).jsonl").write_text(ROWS)
    (root / "other.jsonl").write_text(ROWS * 2)
    (root / "other.jinja").write_text(TEMPLATE)
    start = partial(command, "train", root, *SETTINGS, *NO_CHECKPOINT, f"output_dir={FOLDER}/it's done")
    first = start()
    assert first["code"] == 0, first["stderr"]
    return start


DIFFERENCES = {
    "seed=1": "seed: was 0, is 1",
    "optimizer.learning_rate=3e-4": "optimizer.learning_rate: was ",
    "data.train=other.jsonl": "data: the content of data.train was ",
    "data.truncate=drop": "data: data.truncate was error, is drop",
    "data.chat_template=other.jinja": "data: the chat template was ",
    "adapter.r=4": "adapter.r: was 2, is 4",
    "model.revision=other": "base_weights: was ",
    "schedule.max_steps=2": "schedule.max_steps: was 1, is 2",
}


def test_the_same_settings_on_other_ranks_or_saving_otherwise_are_the_finished_run(again: Run) -> None:
    for harmless in ((), ("batch.micro_batch_size=1", "checkpoint.keep_last=7", "name=other", "engine=zero1")):
        answer = again(*harmless)
        assert answer["code"] == 0, answer["stderr"]
        assert "is already finished" in " ".join(answer["stdout"].split())
        assert answer["left"] == []


@pytest.mark.parametrize("override", DIFFERENCES)
def test_other_settings_are_refused_by_name_and_leave_all_as_it_is(again: Run, override: str) -> None:
    answer = again(override)
    assert answer["code"] == 2, answer
    what, at, do = answer["stderr"].splitlines()
    assert what.startswith(f"TrainingError: the run there is finished, and is another one. {DIFFERENCES[override]}")
    assert ";" not in what, "one difference, one name"
    assert at.endswith("/it's done")
    key = DIFFERENCES[override].partition(":")[0]
    on_from_it = typed("resume.source", at.removeprefix("  at: "))
    assert (f"{on_from_it} and another output_dir" if "steps" in key else f"resume.allow=[{key}]") in do
    assert answer["left"] == []


def test_data_that_has_gone_since_is_said_and_no_mistake(again: Run, tmp_path: Path) -> None:
    data = again.args[1] / FOLDER / "données (1).jsonl"
    kept = data.rename(tmp_path / "kept.jsonl")
    try:
        gone, other = again(), again("data.train=nope.jsonl")
    finally:
        kept.rename(data)
    assert gone["code"] == 0, gone["stderr"]
    assert "the data of that run is not there any more, and was not compared" in " ".join(gone["stdout"].split())
    assert other["code"] == 2
    assert "nope.jsonl" in other["stderr"]


def test_what_is_allowed_to_differ_is_said_and_all_names_are_given_at_once(again: Run) -> None:
    allowed = again("seed=1", "resume.allow=[seed]")
    assert allowed["code"] == 0, allowed["stderr"]
    assert "since that run, seed: was 0, is 1" in allowed["stdout"]
    both = again("seed=1", "adapter.r=4", "resume.allow=[seed]")
    assert both["code"] == 2
    assert "resume.allow=[adapter.r]" in both["stderr"]
    typo = again("resume.allow=[sed]")
    assert "resume.allow names 'sed', which is not compared. Did you mean seed?" in typo["stderr"]


def test_the_command_to_talk_to_it_can_be_pasted(tmp_path: Path) -> None:
    run_dir = tmp_path / FOLDER
    summary: dict[str, Any] = {"steps": 1, "epochs": 1.0, "eval": {}, "model": {"saved": ""}}
    command = dict(end_rows(summary, run_dir))["talk to it"]
    assert shlex.split(command) == ["python", "launch/chat.py", f"run={run_dir}"]


def test_a_run_that_did_not_say_what_it_was_is_finished(again: Run, tmp_path: Path) -> None:
    (tmp_path / "old/model").mkdir(parents=True)
    (tmp_path / "old/config.yaml").write_text("{}")
    (tmp_path / "old/summary.json").write_text(json.dumps({"status": "finished"}))
    answer = again(f"output_dir={tmp_path}/old", "seed=1")
    assert answer["code"] == 0, answer["stderr"]
    assert "already finished" in " ".join(answer["stdout"].split())
