"""The commit protocol of a checkpoint and what is refused on loading, on one rank with real files."""

import errno
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.train.checkpoint import checkpoints as checkpoint
from tunesmith.train.checkpoint import find as checkpoint_find
from tunesmith.train.checkpoint.checkpoints import Checkpoints
from tunesmith.train.checkpoint.find import choose
from tunesmith.train.checkpoint.fingerprint import check_allowed, compare
from tunesmith.train.checkpoint.random_state import seed_everything
from tunesmith.train.config.config import CheckpointConfig, ResumeConfig
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.files import durable, manifest
from tunesmith.train.files.manifest import Identity, Manifest
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.fault_plan import FaultPlan, parse
from tunesmith.train.ranks.progress import progress
from tunesmith.train.ranks.state import RunState
from tunesmith.train.ranks.step_vote import StepConsensus
from tunesmith.train.track.reporter import Reporter

CPU = torch.device("cpu")
WORLD = World()
IDENTITY = Identity(
    fingerprint={"seed": 0, "optimizer.learning_rate": 1e-3, "base_weights": "aa"},
    noted={"schedule.max_steps": 10},
    world_size=1,
    layout={"stage": 0, "world_size": 1},
)
AUTO = ResumeConfig(source="auto")
SHARD = "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"
ALL_WRITTEN = StepConsensus(stop=False, save=False, unwritten=False, failed=False, busy_seconds=(0.0,))


class Weights:
    """An engine with nothing but tensors, which go through the files of the real one."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {name: torch.randn(500, generator=generator) for name in ("a", "b")}

    def save(self, folder: Path, rank_files: Any) -> None:
        from tunesmith.train.zero.checkpoint_engine import EngineFiles

        files = EngineFiles()
        files.rank_files = rank_files
        files.makedirs(str(folder / "engine"))
        files.save({"module": self.tensors}, str(folder / "engine/mp_rank_00_model_states.pt"))
        files.save({"optimizer": {"m": self.tensors["a"] * 2, "view": self.tensors["b"][10:20]}}, str(folder / SHARD))

    def load(self, folder: Path) -> None:
        from tunesmith.train.zero.checkpoint_engine import load_plain

        self.tensors = load_plain(folder / "engine/mp_rank_00_model_states.pt")["module"]


class Told(Reporter):
    def __init__(self) -> None:
        super().__init__(None)
        self.warnings: list[str] = []
        self.saves: list[dict[str, float]] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def saved(self, step: int, **seconds: float) -> None:
        self.saves.append({"step": step, **seconds})


def checkpoints_of(run_dir: Path, told: Told | None = None, **settings: Any) -> Checkpoints:
    return Checkpoints(run_dir, CheckpointConfig(**settings), IDENTITY, WORLD, CPU, told or Told())


def save_steps(run_dir: Path, *steps: int, told: Told | None = None, best: int | None = None, **settings: Any) -> None:
    checkpoints = checkpoints_of(run_dir, told, **settings)
    for step in steps:
        checkpoints.save(Weights(step), RunState(step=step, best_step=best))  # type: ignore[arg-type]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with whole checkpoints of steps 3 and 6."""
    save_steps(tmp_path / "run", 3, 6)
    return tmp_path / "run"


@pytest.fixture
def faults() -> Any:
    """faults("full_disk:save=1") plans faults for this test."""

    def plan(*texts: str) -> None:
        progress.plan = FaultPlan([parse(text) for text in texts], rank=0)

    yield plan
    progress.plan = None


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def step_of(run_dir: Path, warnings: list[str] | None = None, resume: ResumeConfig = AUTO) -> int | None:
    """The step that a start would go on from."""
    found = choose(resume, run_dir, WORLD, CPU, (warnings if warnings is not None else []).append)
    return found.manifest.step if found else None


def loaded(run_dir: Path) -> dict[str, torch.Tensor]:
    weights = Weights(99)
    found = choose(AUTO, run_dir, WORLD, CPU, [].append)
    assert found is not None
    checkpoints_of(run_dir).load(weights, found, converted=None, seed=0)  # type: ignore[arg-type]
    return weights.tensors


def same(tensors: dict[str, torch.Tensor], step: int) -> bool:
    return all(torch.equal(tensors[name], tensor) for name, tensor in Weights(step).tensors.items())


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    seed_everything(5)
    state = RunState(step=7, tokens_seen=123, best_step=4, best_metric=1.5, evaluation={"eval/loss": 1.5})
    checkpoints_of(tmp_path).save(Weights(7), state)  # type: ignore[arg-type]
    drawn = (random.random(), torch.rand(1).item())
    seed_everything(6)
    weights = Weights(99)
    found = choose(AUTO, tmp_path, WORLD, CPU, [].append)
    assert found is not None
    assert checkpoints_of(tmp_path).load(weights, found, converted=None, seed=0) == state  # type: ignore[arg-type]
    assert same(weights.tensors, 7)
    assert (random.random(), torch.rand(1).item()) == drawn


def test_the_manifest_says_what_the_checkpoint_is_and_holds_every_file(run_dir: Path) -> None:
    folder = run_dir / "checkpoints/step-000006"
    written = manifest.read_manifest(folder)
    assert (written.step, written.identity) == (6, IDENTITY)
    assert written.versions["torch"] == torch.__version__
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == set(written.files) | {"MANIFEST.json"}
    assert {"state.json", "rank-00000.json", "rank-00000.safetensors", "rank-00000.files.json", SHARD} <= there
    assert all(durable.digest_of(folder / name) == digest for name, digest in written.files.items())
    latest = json.loads((run_dir / "checkpoints/latest.json").read_text())
    assert latest["folder"] == "step-000006"
    assert latest["manifest_sha256"] == durable.digest_of(folder / "MANIFEST.json").sha256


def in_child(action: Callable[[], None]) -> int:
    """Runs in a forked process; how that ended."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.row(6)
@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sync", "async"])
def test_killed_at_every_file_operation_the_newest_whole_checkpoint_loads(tmp_path: Path, background: bool) -> None:
    """The third save of three, so that an old checkpoint is removed in it; each operation in a process of its own."""
    save_steps(tmp_path / "start", 3, 6)
    listed = tmp_path / "operations"

    def third_save(run_dir: Path, fault: str) -> None:
        progress.plan = FaultPlan([parse(fault)], rank=0)
        checkpoints = checkpoints_of(run_dir, async_save=background)
        checkpoints.save(Weights(9), RunState(step=9))  # type: ignore[arg-type]
        checkpoints.settle()

    shutil.copytree(tmp_path / "start", tmp_path / "counted")
    assert in_child(lambda: third_save(tmp_path / "counted", f"list_files:into={listed}")) == 0
    kinds = [line.split()[2] for line in Path(f"{listed}.0").read_text().splitlines()]
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink"} == set(kinds)
    assert kinds.count("rename") == 3  # the checkpoint, latest.json, and the one that is removed
    published = []
    for operation in range(1, len(kinds) + 1):
        run_dir = tmp_path / f"killed-{operation}"
        shutil.copytree(tmp_path / "start", run_dir)
        assert in_child(lambda: third_save(run_dir, f"kill_at_file:operation={operation}")) == -9  # noqa: B023
        warnings: list[str] = []
        step = step_of(run_dir, warnings)
        assert step in (6, 9)
        assert same(loaded(run_dir), step)
        assert warnings == []
        published.append(step)
        checkpoint_find.remove_stale(run_dir)
        assert not [name for name in names(run_dir) if ".tmp-" in name]
        save_steps(run_dir, 12)
        assert step_of(run_dir) == 12
    assert published == sorted(published)
    assert set(published) == {6, 9}


@pytest.mark.row(9)
def test_a_hundred_flipped_bits_are_refused(run_dir: Path, happened: Callable[[str], None]) -> None:
    folder = run_dir / "checkpoints/step-000006"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lots, refused = random.Random(0), 0
    for number in range(100):
        path = files[number % len(files)]
        whole = path.read_bytes()
        bit = lots.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(TrainingError, match="the checkpoint cannot be used"):
            step_of(run_dir, resume=ResumeConfig(source=str(folder)))
        refused += 1
        path.write_bytes(whole)
    assert refused == 100
    assert step_of(run_dir) == 6
    happened(f"{refused} of 100 refused, over {len(files)} files")


def cut(share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / SHARD
        os.truncate(path, int(path.stat().st_size * share))

    return damage


def mix(folder: Path) -> None:
    shutil.copy(folder.with_name("step-000003") / SHARD, folder / SHARD)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard of 0 %": (cut(0), "has 0 bytes instead of"),
    "shard of 50 %": (cut(0.5), "bytes instead of"),
    "shard of 99 %": (cut(0.99), "bytes instead of"),
    "no shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "no manifest": (lambda folder: (folder / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "an empty manifest": (lambda folder: (folder / "MANIFEST.json").write_bytes(b""), "MANIFEST.json is damaged"),
    "a shard of another step": (mix, "its digest does not fit"),
    "a file too many": (lambda folder: (folder / "engine/mp_rank_01_model_states.pt").touch(), "does not belong"),
    "no random state": (lambda folder: (folder / "rank-00000.json").unlink(), "rank-00000.json is missing"),
    "an empty folder": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "MANIFEST.json is missing"),
}


@pytest.mark.row(8)
@pytest.mark.row(10)
@pytest.mark.row(12)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(run_dir: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(run_dir / "checkpoints/step-000006")
    warnings: list[str] = []
    assert step_of(run_dir, warnings) == 3
    assert len(warnings) == 1
    assert "checkpoint step-000006 is not used" in warnings[0]
    assert words in warnings[0]
    assert "\n" not in warnings[0]
    assert names(run_dir) == ["latest.json", "step-000003", "step-000006.bad-1"]
    assert step_of(run_dir, warnings) == 3
    assert len(warnings) == 1


@pytest.mark.row(11)
def test_where_none_is_whole_nothing_is_started_however_often_one_tries(run_dir: Path) -> None:
    for folder in (run_dir / "checkpoints").glob("step-*"):
        cut(0.5)(folder)
    for _ in range(2):
        with pytest.raises(TrainingError) as caught:
            step_of(run_dir)
        assert "none of them is whole" in str(caught.value)
        assert "another output_dir" in str(caught.value)
    assert names(run_dir) == ["latest.json", "step-000003.bad-1", "step-000006.bad-1"]


def test_a_checkpoint_that_was_named_is_used_or_refused_but_never_replaced(run_dir: Path) -> None:
    older = ResumeConfig(source=str(run_dir / "checkpoints/step-000003"))
    assert step_of(run_dir.with_name("other"), resume=older) == 3
    cut(0.5)(run_dir / "checkpoints/step-000006")
    newest = ResumeConfig(source=str(run_dir / "checkpoints/step-000006"))
    with pytest.raises(TrainingError, match="the checkpoint cannot be used"):
        step_of(run_dir.with_name("other"), resume=newest)
    warnings: list[str] = []
    assert step_of(run_dir.with_name("other"), warnings, ResumeConfig(source=str(run_dir))) == 3
    assert len(warnings) == 1
    assert names(run_dir) == ["latest.json", "step-000003", "step-000006"]  # another run's folder is left as it is


def test_a_folder_without_checkpoints_starts_and_one_that_was_named_does_not(tmp_path: Path) -> None:
    assert step_of(tmp_path) is None
    assert step_of(tmp_path, resume=ResumeConfig(source="never")) is None
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        step_of(tmp_path, resume=ResumeConfig(source=str(tmp_path / "nope")))


@pytest.mark.row(10)
@pytest.mark.parametrize("content", [None, b"", b'{"step": 9, "folder": "step-000009"}', b"\xff\xfe"])
def test_latest_json_does_not_matter_to_loading(run_dir: Path, content: bytes | None) -> None:
    latest = run_dir / "checkpoints/latest.json"
    latest.unlink() if content is None else latest.write_bytes(content)
    warnings: list[str] = []
    assert step_of(run_dir, warnings) == 6
    assert warnings == []


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)  # noqa: TID251 - a payload, which nobody calls here


def sign_again(folder: Path, change: Callable[[Manifest], Manifest] = lambda written: written) -> None:
    """As somebody would who may write there: digests and manifest fit what is there now."""
    written = manifest.read_manifest(folder)
    files = {name: durable.digest_of(folder / name) for name in written.files}
    (folder / "MANIFEST.json").write_bytes(change(replace(written, files=files)).to_bytes())


@pytest.mark.row(28)
@pytest.mark.parametrize("name", [SHARD, "engine/mp_rank_00_model_states.pt"])
def test_a_program_in_a_shard_is_refused_and_not_run_even_with_digests_that_fit(
    run_dir: Path, tmp_path: Path, name: str
) -> None:
    folder, canary = run_dir / "checkpoints/step-000006", tmp_path / "canary"
    torch.save({"optimizer": Hostile(canary)}, folder / name)
    sign_again(folder)
    with pytest.raises(TrainingError, match=rf"{name} holds (posix|os)\.system, which could run code"):
        step_of(run_dir)
    assert not canary.exists()
    from tunesmith.train.zero.checkpoint_engine import load_plain

    with pytest.raises(TrainingError, match="could run code; nothing of it was run"):
        load_plain(folder / name)
    assert not canary.exists()


@pytest.mark.row(33)
@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "engine/../../x", ""])
def test_a_manifest_that_leads_outside_is_damaged(run_dir: Path, name: str) -> None:
    folder = run_dir / "checkpoints/step-000006"
    outside = {name: durable.FileDigest(0, "00")}
    sign_again(folder, lambda written: replace(written, files=written.files | outside))
    with pytest.raises(manifest.ManifestError, match="lacks what it must hold"):
        manifest.read_manifest(folder)
    assert step_of(run_dir) == 3


def write_signed(folder: Path, tree: dict[str, Any]) -> None:
    """A manifest of another version of this code."""
    del tree["sha256"]
    signed = durable.json_bytes(tree | {"sha256": manifest._digest(tree)})
    (folder / "MANIFEST.json").write_bytes(signed)


def test_a_checkpoint_of_format_2_is_resumed_from(run_dir: Path) -> None:
    folder = run_dir / "checkpoints/step-000006"
    tree = json.loads((folder / "MANIFEST.json").read_text()) | {"format": 2}
    tree["identity"] |= {"stage": 2, "accumulation": 1, "precision": "fp32", "config_sha256": "00"}
    before = manifest.read_manifest(folder)
    write_signed(folder, tree)
    assert manifest.read_manifest(folder) == before
    assert step_of(run_dir) == 6
    assert names(run_dir) == ["latest.json", "step-000003", "step-000006"]


def test_a_format_of_another_time_is_named(run_dir: Path) -> None:
    folder = run_dir / "checkpoints/step-000006"
    write_signed(folder, json.loads((folder / "MANIFEST.json").read_text()) | {"format": 1})
    for source in (str(folder), "auto"):
        with pytest.raises(TrainingError, match="its format is 1, and this Tunesmith reads formats 2 and 3") as caught:
            step_of(run_dir, resume=ResumeConfig(source=source))
        assert "another version of Tunesmith" in str(caught.value)
    assert names(run_dir) == ["latest.json", "step-000003", "step-000006"]


@pytest.mark.parametrize("name", ["MANIFEST.json", SHARD])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_read_today_is_refused_and_stays(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    opened = io.open

    def open_or_fail(file: Any, *arguments: Any, **more: Any) -> Any:
        if str(file).endswith(f"step-000006/{name}"):
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *arguments, **more)

    monkeypatch.setattr(io, "open", open_or_fail)  # what pathlib opens with
    with pytest.raises(TrainingError, match=f"cannot be read.*{os.strerror(number)}") as caught:
        step_of(run_dir)
    assert name in str(caught.value)
    monkeypatch.undo()
    assert names(run_dir) == ["latest.json", "step-000003", "step-000006"]
    assert step_of(run_dir) == 6


def chown(path: Path) -> None:
    os.chown(path, 54321, -1)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard of another user": (lambda folder: chown(folder / SHARD), "belongs to user 54321"),
    "a folder of another user": (chown, "step-000006 belongs to user 54321"),
    "a shard that anybody may write": (lambda folder: (folder / SHARD).chmod(0o666), "may be written by anybody"),
    "a folder that anybody may write": (lambda folder: (folder / "engine").chmod(0o777), "engine may be written by"),
}


@pytest.mark.row(35)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_others_is_refused_until_it_is_allowed(run_dir: Path, kind: str) -> None:
    if "user" in kind and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    change, words = FOREIGN[kind]
    change(run_dir / "checkpoints/step-000006")
    with pytest.raises(TrainingError, match=words) as caught:
        step_of(run_dir)
    assert "resume.allow=[owner]" in str(caught.value)
    assert step_of(run_dir, resume=ResumeConfig(source="auto", allow=["owner"])) == 6


def test_a_link_is_refused_and_a_group_that_may_write_is_a_warning(run_dir: Path, tmp_path: Path) -> None:
    folder, warnings = run_dir / "checkpoints/step-000006", list[str]()
    (folder / SHARD).chmod(0o664)
    assert step_of(run_dir, warnings) == 6
    assert len(warnings) == 1
    assert "its group" in warnings[0]
    shutil.move(folder / SHARD, tmp_path / "elsewhere.pt")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(TrainingError, match="is a link"):
        step_of(run_dir, resume=ResumeConfig(source="auto", allow=["owner"]))


@pytest.mark.parametrize(
    ("settings", "best", "kept"),
    [
        ({}, None, [12, 15]),
        ({"keep_last": 3}, None, [9, 12, 15]),
        ({}, 3, [3, 12, 15]),
        ({"keep_every_steps": 6}, None, [6, 12, 15]),
        ({"keep_every_steps": 9}, 3, [3, 9, 12, 15]),
    ],
)
def test_the_last_the_best_and_every_nth_are_kept(
    tmp_path: Path, settings: dict[str, int], best: int | None, kept: list[int]
) -> None:
    save_steps(tmp_path, 3, 6, 9, 12, 15, best=best, **settings)
    assert names(tmp_path) == ["latest.json", *(f"step-{step:06d}" for step in kept)]


def test_the_one_that_was_loaded_is_never_removed(run_dir: Path) -> None:
    checkpoints = checkpoints_of(run_dir)
    found = choose(AUTO, run_dir, WORLD, CPU, [].append)
    assert found is not None
    checkpoints.load(Weights(), found, converted=None, seed=0)  # type: ignore[arg-type]
    for step in (9, 12, 15):
        checkpoints.save(Weights(step), RunState(step=step))  # type: ignore[arg-type]
    assert checkpoints.steps() == [6, 12, 15]


def test_a_published_step_is_never_written_again(run_dir: Path) -> None:
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints/step-000006").rglob("*") if path.is_file()}
    told = Told()
    checkpoints = checkpoints_of(run_dir, told)
    checkpoints.save(Weights(77), RunState(step=6))  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in before} == before
    assert told.warnings == []
    assert names(run_dir) == ["latest.json", "step-000003", "step-000006"]


@pytest.mark.parametrize("can_be_renamed", [True, False])
def test_a_damaged_folder_of_the_same_step_is_not_taken_for_the_save(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, can_be_renamed: bool
) -> None:
    shard = run_dir / "checkpoints/step-000006" / SHARD
    shard.write_bytes(bytes(len(shard.read_bytes())))
    renamed = durable.replace

    def rename(source: Path, target: Path) -> None:
        if not can_be_renamed and ".bad-" in target.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        renamed(source, target)

    monkeypatch.setattr(durable, "replace", rename)
    told = Told()
    checkpoints = checkpoints_of(run_dir, told)
    checkpoints.save(Weights(66), RunState(step=6))  # type: ignore[arg-type]
    if can_be_renamed:
        assert checkpoints.saved_step == 6
        assert same(loaded(run_dir), 66)
        assert names(run_dir) == ["latest.json", "step-000003", "step-000006", "step-000006.bad-1"]
    else:
        assert checkpoints.saved_step is None
        assert "step-000006 is there, cannot be used and not be renamed" in told.warnings[0]


def test_going_back_sets_the_later_steps_aside(run_dir: Path) -> None:
    checkpoints = checkpoints_of(run_dir)
    checkpoints.forget_after(3)
    assert step_of(run_dir) == 3
    checkpoints.save(Weights(66), RunState(step=6))  # type: ignore[arg-type]
    assert same(loaded(run_dir), 66)


@pytest.mark.row(7)
def test_a_full_disk_drops_the_save_and_too_many_in_a_row_end_the_run(run_dir: Path, faults: Any) -> None:
    told = Told()
    checkpoints = checkpoints_of(run_dir, told, max_failed_saves=3)
    plan = ["full_disk:save=1,operation=1", "full_disk:save=2,operation=6", "full_disk:save=4,operation=3"]
    faults(*plan, "full_disk:save=5,operation=9", "full_disk:save=6,operation=2")
    for step in (9, 12):
        assert checkpoints.save(Weights(step), RunState(step=step)) is None  # type: ignore[arg-type]
        assert names(run_dir) == ["latest.json", "step-000003", "step-000006"]
    assert checkpoints.save(Weights(15), RunState(step=15)) is not None  # type: ignore[arg-type]
    assert same(loaded(run_dir), 15)
    for step in (18, 21):
        checkpoints.save(Weights(step), RunState(step=step))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="3 checkpoints in a row could not be written") as caught:
        checkpoints.save(Weights(24), RunState(step=24))  # type: ignore[arg-type]
    assert "No space left on device" in str(caught.value)
    assert len(told.warnings) == 4
    assert "(1 in a row, at 3 the run ends)" in told.warnings[0]
    assert step_of(run_dir) == 15


def test_a_disk_without_room_for_the_next_one_is_seen_before_it_is_begun(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    checkpoints = checkpoints_of(run_dir, told)
    checkpoints.save(Weights(9), RunState(step=9))  # type: ignore[arg-type]
    size = sum(path.stat().st_size for path in (run_dir / "checkpoints/step-000009").rglob("*") if path.is_file())
    real = os.statvfs(run_dir)
    free = size * 1.1
    figures = type("Figures", (), {"f_bavail": free / real.f_frsize, "f_frsize": real.f_frsize})
    monkeypatch.setattr(os, "statvfs", lambda _: figures)
    assert checkpoints.save(Weights(12), RunState(step=12)) is None  # type: ignore[arg-type]
    assert "and a checkpoint needs" in told.warnings[0]
    free = size * 1.3
    figures.f_bavail = free / real.f_frsize  # type: ignore[attr-defined]
    assert checkpoints.save(Weights(15), RunState(step=15)) is not None  # type: ignore[arg-type]


def test_in_the_background_the_state_of_the_moment_is_written_while_training_changes_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, weights, state = Told(), Weights(9), RunState(step=9, tokens_seen=90)
    checkpoints = checkpoints_of(run_dir, told, async_save=True)
    slow = durable.write_file

    def write_slowly(path: Path, write: Any) -> Any:
        time.sleep(0.2)  # six files: far more than the copy takes on a busy machine
        return slow(path, write)

    monkeypatch.setattr(durable, "write_file", write_slowly)
    assert checkpoints.save(weights, state) is None  # type: ignore[arg-type]
    assert checkpoints.unwritten
    weights.tensors["a"].zero_()
    weights.tensors["b"].add_(1)
    state.step, state.tokens_seen = 10, 100
    assert step_of(run_dir) == 6
    checkpoints.advance(replace(ALL_WRITTEN, unwritten=True), 10)
    for _ in range(1000):
        checkpoints.advance(replace(ALL_WRITTEN, unwritten=checkpoints.unwritten), 11)
        if checkpoints.saved_step == 9:
            break
        time.sleep(0.01)
    assert same(loaded(run_dir), 9)
    assert json.loads((run_dir / "checkpoints/step-000009/state.json").read_text())["tokens_seen"] == 90
    (timed,) = told.saves
    assert timed["step"] == 11
    assert timed["save_seconds"] > 1.2 > 2 * timed["stall_seconds"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_publisher_that_dies_in_its_thread_has_published_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr(checkpoint, "publish", out_of_memory)
    told = Told()
    checkpoints = checkpoints_of(run_dir, told, async_save=True)
    checkpoints.save(Weights(9), RunState(step=9))  # type: ignore[arg-type]
    while checkpoints.unwritten:
        time.sleep(0.01)
    checkpoints.advance(ALL_WRITTEN, 10)
    checkpoints.settle()
    assert checkpoints.saved_step != 9
    assert len(told.warnings) == 1


def test_a_second_save_waits_for_the_first_and_the_end_for_both(run_dir: Path) -> None:
    checkpoints = checkpoints_of(run_dir, async_save=True)
    for step in (9, 12):
        checkpoints.save(Weights(step), RunState(step=step))  # type: ignore[arg-type]
    assert checkpoints.saved_step == 9
    checkpoints.settle()
    assert (checkpoints.saved_step, step_of(run_dir)) == (12, 12)


def test_a_failure_in_the_background_is_told_and_leaves_nothing(run_dir: Path, faults: Any) -> None:
    faults("full_disk:save=1,operation=5")
    told = Told()
    checkpoints = checkpoints_of(run_dir, told, async_save=True)
    checkpoints.save(Weights(9), RunState(step=9))  # type: ignore[arg-type]
    while checkpoints.unwritten:
        time.sleep(0.01)
    assert checkpoints.failed
    checkpoints.advance(replace(ALL_WRITTEN, failed=True), 10)
    assert len(told.warnings) == 1
    assert names(run_dir) == ["latest.json", "step-000003", "step-000006"]
    assert not checkpoints.failed


def other(**fingerprint: Any) -> Identity:
    return replace(IDENTITY, fingerprint=IDENTITY.fingerprint | fingerprint)


@pytest.mark.row(19)
def test_everything_that_differs_is_named_at_once_and_each_must_be_allowed() -> None:
    current = other(seed=1, base_weights="bb")
    with pytest.raises(TrainingError) as caught:
        compare(IDENTITY, current, [], Path("step-000006"))
    assert "seed: was 0, is 1; base_weights: was aa, is bb" in str(caught.value)
    assert "resume.allow=[seed,base_weights]" in str(caught.value)
    with pytest.raises(TrainingError, match="base_weights: was aa"):
        compare(IDENTITY, current, ["seed"], Path("step-000006"))
    notes = compare(IDENTITY, current, ["seed", "base_weights"], Path("step-000006"))
    assert notes == ["since the checkpoint, seed: was 0, is 1", "since the checkpoint, base_weights: was aa, is bb"]


def test_more_steps_are_only_noted() -> None:
    longer = replace(IDENTITY, noted={"schedule.max_steps": 20})
    assert compare(IDENTITY, longer, [], Path("x")) == ["since the checkpoint, schedule.max_steps: was 10, is 20"]


def test_a_checkpoint_older_than_a_setting_was_made_with_its_default() -> None:
    assert compare(IDENTITY, other(**{"objective.kind": "sft", "objective.settings": {}}), [], Path("old")) == []
    with pytest.raises(TrainingError, match=r"objective.kind: was sft, is dpo"):
        compare(IDENTITY, other(**{"objective.kind": "dpo"}), [], Path("old"))


def test_allowing_what_is_not_compared_is_a_mistake() -> None:
    check_allowed(["seed", "owner", "base_weights"], IDENTITY)
    with pytest.raises(ConfigError, match=r"Did you mean optimizer\.learning_rate"):
        check_allowed(["optimizer.learningrate"], IDENTITY)


def test_tensors_that_share_memory_share_it_in_the_copy() -> None:
    from collections import OrderedDict

    from tunesmith.train.files.host_copy import host_copy

    whole = torch.arange(12.0)
    tree = OrderedDict(
        whole=whole, part=whole[3:9].view(2, 3), shape=whole.shape, rest=[(1, "a", None)], half=whole.half()
    )
    copied = host_copy(tree)
    assert type(copied) is OrderedDict
    assert torch.equal(copied["part"], tree["part"])
    assert copied["shape"] == torch.Size([12])
    assert copied["rest"] == [(1, "a", None)]
    copied["whole"][4] = 100
    assert copied["part"][0, 1] == 100
    assert whole[4] == 4
    assert torch.equal(copied["half"], whole.half())
