"""Two attempts at one run: the older one commits nothing once the newer one has taken the folder."""

import json
import threading

import pytest

from tunesmith.train.checkpoint import find as checkpoint_find
from tunesmith.train.errors import ConfigError
from tunesmith.train.files import durable, fence, rows, run_folder
from tunesmith.train.files.fence import Fence, Superseded, Token, supersedes, token_from_environment, token_in
from tunesmith.train.files.run_folder import check_usable
from tunesmith.train.files.step_folders import step_folder

OLD, NEW, OTHER = Token("job 7 of c", 0), Token("job 7 of c", 1), Token("job 8 of c", 0)


@pytest.fixture
def this_process():
    """The fence that durable.py asks."""
    yield fence.fence
    fence.fence.leave()


def test_without_a_token_everything_passes(tmp_path, this_process):
    this_process.check()
    durable.write_json(tmp_path / "a.json", {})
    assert not (tmp_path / fence.FILE).exists()


def test_the_older_attempt_is_refused_every_commit_once_the_newer_has_the_folder(tmp_path, this_process):
    this_process.take(tmp_path, OLD)
    durable.write_json(tmp_path / "before.json", {"step": 1})
    (tmp_path / "there.json").write_text("old")
    Fence().take(tmp_path, NEW)
    left = sorted(tmp_path.iterdir())
    commits = [
        lambda: durable.replace(tmp_path / "there.json", tmp_path / "elsewhere.json"),
        lambda: durable.make_folder(tmp_path / "checkpoints"),
        lambda: durable.remove_tree(tmp_path),
        lambda: durable.write_atomically(tmp_path / "before.json", b"other"),
        lambda: rows.write_rows(tmp_path / "samples.jsonl", []),
        lambda: checkpoint_find.set_aside_after(tmp_path, 0) or this_process.check(),
    ]
    for commit in commits:
        with pytest.raises(
            Superseded, match=r"job 7 of c, restart 1 has taken over this run; .* stops without writing"
        ):
            commit()
    assert sorted(tmp_path.iterdir()) == left
    assert (tmp_path / "before.json").read_text() == '{\n  "step": 1\n}\n'


def test_what_was_staged_before_cannot_be_published_after(tmp_path):
    """Even by an attempt that looked at the token just before it changed hands."""
    staged = step_folder(tmp_path, 6).with_name("step-000006.tmp-0a0b")
    staged.mkdir(parents=True)
    (staged / "state.json").write_text("{}")
    Fence().take(tmp_path, NEW)
    checkpoint_find.remove_stale(tmp_path)
    with pytest.raises(FileNotFoundError):
        durable.replace(staged, step_folder(tmp_path, 6))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_was_published_just_before_is_left_whole(tmp_path, monkeypatch):
    """The older attempt renames it between the newer one's look at the folder and its own rename."""
    staged = step_folder(tmp_path, 6).with_name("step-000006.tmp-0a0b")
    staged.mkdir(parents=True)
    (staged / "state.json").write_text("{}")
    rename = durable.replace

    def late(source, target):
        if source == staged and staged.exists():
            staged.rename(step_folder(tmp_path, 6))
        rename(source, target)

    monkeypatch.setattr(durable, "replace", late)
    checkpoint_find.remove_stale(tmp_path)
    assert (step_folder(tmp_path, 6) / "state.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("there", "taken"),
    [(OLD, True), (NEW, False), (OTHER, False), (None, False)],
)
def test_the_lock_is_taken_over_from_an_earlier_start_of_the_same_job_alone(tmp_path, there, taken):
    held = run_folder.hold(tmp_path)
    if there:
        Fence().take(tmp_path, there)
    assert supersedes(NEW, tmp_path) is taken
    if taken:
        lock = run_folder.hold(tmp_path, NEW)
        with pytest.raises(ConfigError, match="another run is writing"):
            run_folder.hold(tmp_path)
        lock.release()
    else:
        with pytest.raises(ConfigError, match="another run is writing"):
            run_folder.hold(tmp_path, NEW)
    held.release()


def test_a_start_has_slurms_job_and_restart_or_a_token_of_its_own(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert token_from_environment() != token_from_environment()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    assert token_from_environment() == OLD
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert token_from_environment() == NEW


def test_a_watcher_hears_of_the_newer_attempt_without_any_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(fence, "LOOK_SECONDS", 0.02)
    heard = threading.Event()
    own = Fence()
    own.take(tmp_path, OLD)
    own.watch(lambda lost: heard.set())
    assert not heard.wait(0.1)
    Fence().take(tmp_path, NEW)
    assert heard.wait(5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"launch": 3}', "null"])
def test_a_file_that_is_no_token_keeps_nobody_out(tmp_path, text):
    (tmp_path / fence.FILE).write_text(text)
    assert token_in(tmp_path) is None
    own = Fence()
    own.join(tmp_path, NEW)
    own.check()
    assert not supersedes(NEW, tmp_path)


def test_a_folder_with_a_job_and_a_token_alone_is_free_for_a_run(tmp_path):
    Fence().take(tmp_path, NEW)
    (tmp_path / "job").mkdir()
    check_usable(tmp_path, "auto")
    assert json.loads((tmp_path / fence.FILE).read_text()) == {"launch": NEW.launch, "restart": 1}


def test_an_older_start_that_comes_late_does_not_take_the_folder_back(tmp_path):
    Fence().take(tmp_path, NEW)
    with pytest.raises(Superseded):
        Fence().take(tmp_path, OLD)
    assert token_in(tmp_path) == NEW
    Fence().take(tmp_path, OTHER)  # a job of its own: who may start is the lock's business
    assert token_in(tmp_path) == OTHER
