"""The run folder: one run at a time, drafts kept until they are not needed, and no false alarm between ranks."""

import errno
import os

import pytest
import torch

from tunesmith.train.answer import export
from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Kernels
from tunesmith.train.data.prepare import prepare
from tunesmith.train.data.tokenizer import load_tokenizer
from tunesmith.train.errors import ConfigError
from tunesmith.train.files.run_folder import best_folder, check_usable, create, is_finished
from tunesmith.train.objective.objective import make_objective
from tunesmith.train.ranks.distributed import World
from tunesmith.train.run.setup import make_run
from tunesmith.train.run.training import train
from tunesmith.train.track.reporter import Reporter


@pytest.mark.row(26)
def test_a_second_run_is_refused_while_the_first_one_writes(tmp_path):
    lock = create(tmp_path / "run", "name: one")
    with pytest.raises(ConfigError, match="another run is writing"):
        create(tmp_path / "run", "name: two")
    assert (tmp_path / "run/config.yaml").read_text() == "name: one"
    lock.release()
    create(tmp_path / "run", "name: two").release()


@pytest.fixture
def composed(tmp_path):
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    return compose_config(["+exp=debug", "batch.packing=none", "resume.allow=[nonsense]", cache])


@pytest.fixture
def made(composed):
    """made(folder) is a run there whose first session is refused: resume.allow names what is not compared."""
    config = composed.config
    tokenizer = load_tokenizer(config.model, config.data)
    objective = make_objective(config, tokenizer)
    data = prepare(config, tokenizer, objective, show_progress=False)
    parts = {"tokenizer": tokenizer, "objective": objective, "data": data}
    parts |= {"kernels": Kernels.torch, "reporter": Reporter(None)}
    return lambda folder: make_run(config, World(), torch.device("cpu"), folder, **parts)


def test_the_lock_of_a_folder_that_is_there_is_taken_before_anything_in_it_is_touched(tmp_path, composed, made):
    folder = tmp_path / "run"
    lock = create(folder, "name: one")
    (folder / "checkpoints/step-000004").mkdir(parents=True)  # a damaged one
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match="another run is writing"):
        train(composed, made(folder), None, [], only_profile=False)
    assert sorted(folder.rglob("*")) == before
    lock.release()


def test_a_folder_that_set_up_has_failed_for_is_not_left_behind(tmp_path, composed, made):
    with pytest.raises(ConfigError, match="names 'nonsense', which is not compared"):
        train(composed, made(tmp_path / "new"), None, [], only_profile=False)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_the_config_that_was_there(tmp_path, monkeypatch):
    create(tmp_path / "run", "name: one").release()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for folder in (tmp_path / "run", tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            create(folder, "name: two")
    monkeypatch.undo()
    assert (tmp_path / "run/config.yaml").read_text() == "name: one"
    assert not (tmp_path / "new/config.yaml").exists()
    check_usable(tmp_path / "new", "auto")


def test_another_ranks_probe_does_not_make_a_folder_look_used(tmp_path):
    (tmp_path / ".tunesmith-abc").mkdir()
    check_usable(tmp_path, "auto")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        check_usable(tmp_path, "auto")


def test_a_published_model_leaves_its_draft_until_it_is_discarded(tmp_path):
    draft = best_folder(tmp_path, 7)
    draft.mkdir(parents=True)
    (draft / "model.safetensors").write_bytes(b"new")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"old")
    export.publish(draft, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == b"new"
    assert (draft / "model.safetensors").exists()
    assert not is_finished(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    export.discard_drafts(draft)
    assert is_finished(tmp_path)
    assert os.listdir(tmp_path / "model") == ["model.safetensors"]
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("source", ["never", "runs/other"])
def test_a_run_that_died_before_its_first_save_may_start_once_more(tmp_path, source):
    create(tmp_path, "name: one").release()
    (tmp_path / "checkpoints/step-000002.tmp-0a1b2c31").mkdir(parents=True)
    check_usable(tmp_path, source)
    for kept in ("checkpoints/step-000002", "checkpoints/step-000002.bad-1", "model"):
        (tmp_path / kept).mkdir()
        with pytest.raises(ConfigError, match="already holds a run"):
            check_usable(tmp_path, source)
        (tmp_path / kept).rmdir()
