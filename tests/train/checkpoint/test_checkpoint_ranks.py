"""Checkpoints of two ranks with a real engine: one rank's full disk, the background, every precision, another base."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import covered
from safetensors.torch import load_file, save_file

OverridesOf = Callable[..., list[str]]
NUM_STEPS = 8


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]], make_model: Callable[..., Path]) -> OverridesOf:
    """Overrides of a short run with dropout, saved every two steps."""
    own = ["batch.global_batch_size=4", "batch.micro_batch_size=1", "schedule=cosine", "checkpoint.every_steps=2"]
    own += ["optimizer.learning_rate=3e-3"]
    model = make_model(attention_dropout=0.1)
    return lambda stage, *more: short_run(stage, NUM_STEPS, *own, *more, records=40, model=model)


MATRIX = [(stage, precision) for stage in range(4) for precision in ("bf16", "fp16")]


@pytest.mark.parametrize(("stage", "precision"), covered(MATRIX, [(1, "bf16")]))
def test_what_each_kind_of_engine_saves_is_allowed_and_loads_bitwise(
    ranks: Callable[[int], Any],
    overrides_of: OverridesOf,
    tmp_path: Path,
    stage: int,
    precision: str,
) -> None:
    overrides = overrides_of(stage, f"engine.precision={precision}")
    alone = ranks(2).train_in_pieces(overrides=overrides, run_dir=str(tmp_path / "alone"), stop_after=[])
    taken_up = ranks(2).train_in_pieces(overrides=overrides, run_dir=str(tmp_path / "pieces"), stop_after=[3])
    assert taken_up[0]["started_at"] == [0, 2]
    assert len(alone[0]["losses"]) == NUM_STEPS
    assert taken_up[0]["losses"] == alone[0]["losses"]


@pytest.mark.row(17)
@pytest.mark.parametrize(
    ("stage", "more"),
    covered([(2, "adapter=lora"), (3, "adapter=none")], [], [(2, "adapter=lora")]),
)
def test_in_the_background_a_resumed_run_is_bitwise_the_same(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, stage: int, more: str
) -> None:
    alone = ranks(2).train_in_pieces(
        overrides=overrides_of(stage, more), run_dir=str(tmp_path / "alone"), stop_after=[]
    )
    background = overrides_of(stage, more, "checkpoint.async_save=true")
    found = ranks(2).train_in_pieces(overrides=background, run_dir=str(tmp_path / "pieces"), stop_after=[5, 3])
    _, second, third = found[0]["started_at"]  # of the last save of a piece, nobody knows whether it was published
    assert second in (2, 4)
    assert third in (second, second + 2)
    assert found[0]["losses"] == alone[0]["losses"]
    steps = {int(path.name[-6:]) for path in (tmp_path / "pieces/checkpoints").glob("step-??????")}
    assert steps == {third, 6, 8}


def with_a_small_disk(rank: Any, overrides: list[str], run_dir: str, small_from: int, small_to: int) -> dict[str, Any]:
    """On every rank: a run in which rank 1 cannot write more than 100 kB a file between two of its steps."""
    import resource

    from tunesmith.train.errors import TrainingError

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with rank.ready(overrides, run_dir) as (loop, recorder):
        error = ""
        try:
            for number in range(NUM_STEPS):
                if number in (small_from, small_to):
                    loop.session.checkpoints.settle()  # what is still being written belongs to the time before
                small = rank.world.rank == 1 and small_from <= number < small_to
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if small else hard, hard))
                loop.step()
            loop.session.checkpoints.settle()
        except TrainingError as failed:
            error = str(failed)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return {"losses": recorder.losses, "warnings": recorder.warnings, "error": error}


@pytest.mark.row(7)
@pytest.mark.parametrize("background", covered([False, True], [True], [False]), ids=["sync", "async"])
def test_one_ranks_full_disk_drops_the_save_on_all_and_training_goes_on(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, background: bool
) -> None:
    overrides = overrides_of(2, f"checkpoint.async_save={str(background).lower()}")
    once = ranks(2).run(
        with_a_small_disk, overrides=overrides, run_dir=str(tmp_path / "once"), small_from=2, small_to=4
    )
    assert len(once[0]["losses"]) == NUM_STEPS
    assert [found["error"] for found in once] == ["", ""]
    assert len(once[0]["warnings"]) == 1
    assert (
        "step 4: the checkpoint could not be written (rank 1: File too large: zero_pp_rank_1" in once[0]["warnings"][0]
    )
    kept = sorted(path.name for path in (tmp_path / "once/checkpoints").iterdir())
    assert kept == ["latest.json", "step-000006", "step-000008"]
    if background:
        return
    ever = ranks(2).run(
        with_a_small_disk, overrides=overrides, run_dir=str(tmp_path / "ever"), small_from=2, small_to=99
    )
    assert all("3 checkpoints in a row could not be written" in found["error"] for found in ever)
    assert all("do: raise the limit of a file's size (ulimit -f)" in found["error"] for found in ever)
    assert sorted(path.name for path in (tmp_path / "ever/checkpoints").iterdir()) == ["latest.json", "step-000002"]


def without_room_for_the_best(rank: Any, overrides: list[str], run_dir: str, small: list[int]) -> dict[str, Any]:
    """On every rank: a run in which rank 0 cannot write large files in some of its evaluations.

    Where that is in all of them, neither at its end, where the model would be written that is the last and so the best.
    """
    import resource
    from dataclasses import replace

    from worker import ScriptedObjective

    from tunesmith.train.errors import TrainingError
    from tunesmith.train.run import best as best_weights
    from tunesmith.train.run.finish import finish
    from tunesmith.train.run.loop import Loop

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_room(room: bool, action: Callable[[], Any]) -> Any:
        limit = hard if room or rank.world.rank else 30_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return action()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    keep_if_better, best = best_weights.keep_if_better, list[int | None]()

    def keep_and_note(run: Any, session: Any, metrics: dict[str, float]) -> None:
        with_room(session.state.step not in small, lambda: keep_if_better(run, session, metrics))
        best.append(session.state.best_step)

    with rank.ready(overrides, run_dir) as (made, recorder):
        objective = ScriptedObjective(made, [4.0, 3.0, 2.0, 1.0])  # each is the best so far
        loop = Loop(replace(made.run, objective=objective), made.session)
        best_weights.keep_if_better = keep_and_note
        try:
            loop.train()
        finally:
            best_weights.keep_if_better = keep_if_better
        error = ""
        if loop.session.state.best_step is None:
            try:
                with_room(False, lambda: finish(loop.run, loop.session, loop.stop))
            except TrainingError as failed:
                error = str(failed)
        return {"best": best, "warnings": recorder.warnings, "error": error, "num_steps": len(recorder.steps)}


@pytest.mark.row(7)
def test_best_weights_that_cannot_be_written_are_passed_over_by_all_ranks(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, make_records: Callable[..., Path], tmp_path: Path
) -> None:
    evaluates = ["evaluate.every_steps=2", f"data.validation={make_records(9, seed=1)}", "checkpoint.at_end=false"]
    overrides = overrides_of(3, *evaluates, "checkpoint.every_steps=null")

    def run(name: str, small: list[int]) -> list[dict[str, Any]]:
        return ranks(2).run(without_room_for_the_best, overrides=overrides, run_dir=str(tmp_path / name), small=small)

    once = run("once", [4, 8])
    assert [found["best"] for found in once] == [[2, 2, 6, 6]] * 2
    assert [found["num_steps"] for found in once] == [NUM_STEPS] * 2
    assert len(once[0]["warnings"]) == 2
    assert "step 4: the best so far, but the model could not be written. rank 0: " in once[0]["warnings"][0]
    assert "step 2 stays it; training goes on" in once[0]["warnings"][0]
    assert once[0]["warnings"] == once[1]["warnings"]
    ever = run("ever", [2, 4, 6, 8])
    assert [found["best"] for found in ever] == [[None] * 4] * 2
    assert all("TrainingError: the model could not be written. rank 0: " in found["error"] for found in ever)
    assert all("do: raise the limit of a file's size (ulimit -f)" in found["error"] for found in ever)
    assert list((tmp_path / "ever/best").iterdir()) == []


def ended_while_saving(rank: Any, overrides: list[str], run_dir: str) -> dict[str, Any]:
    """On every rank: a run that its losses end while a checkpoint is being written, slowly."""
    from tunesmith.train.errors import TrainingError
    from tunesmith.train.files import durable

    write_file = durable.write_file

    def write_slowly(path: Path, write: Any) -> Any:
        time.sleep(0.3)
        return write_file(path, write)

    with rank.ready(overrides, run_dir) as (loop, _):
        durable.write_file = write_slowly
        try:
            with rank.faults(loop, "nan:rank=0,step=2"):
                loop.train()
        except TrainingError as error:
            return {"error": str(error), "step": loop.session.state.step, "saved": loop.session.checkpoints.saved_step}
        finally:
            durable.write_file = write_file
    return {}


def test_a_run_that_its_losses_end_still_publishes_the_save_under_way(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path
) -> None:
    overrides = overrides_of(2, "checkpoint.async_save=true", "optimizer.max_skipped_steps=1")
    for found in ranks(2).run(ended_while_saving, overrides=overrides, run_dir=str(tmp_path / "run")):
        assert "is not finite" in found.pop("error").replace("that is not", "is not")
        assert found == {"step": 3, "saved": 2}
    assert (tmp_path / "run/checkpoints/step-000002/MANIFEST.json").is_file()


def saved_steps(rank: Any, overrides: list[str], run_dir: str) -> list[int]:
    """On every rank: a whole run of the loop; the steps that it has saved, by the warnings it has not given."""

    steps: list[int] = []
    with rank.ready(overrides, run_dir) as (loop, recorder):
        recorder.saved = lambda step, **_: steps.append(step)
        loop.train()
    return steps


def test_rank_0s_clock_decides_for_all(ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path) -> None:
    overrides = overrides_of(2, "checkpoint.every_steps=null", "checkpoint.every_minutes=1e-6")
    assert ranks(2).run(saved_steps, overrides=overrides, run_dir=str(tmp_path / "run")) == [[*range(1, 9)]] * 2
    rarely = overrides_of(2, "checkpoint.every_steps=null", "checkpoint.every_minutes=1000")
    assert ranks(2).run(saved_steps, overrides=rarely, run_dir=str(tmp_path / "rare")) == [[8]] * 2


def base_digest(rank: Any, overrides: list[str], run_dir: str) -> str:
    with rank.ready(overrides, run_dir) as (loop, _):
        return loop.session.checkpoints._identity.fingerprint["base_weights"]


def with_a_changed_weight(model: Path, folder: Path) -> Path:
    """The same model, but for the last bit of one weight."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(name for name in tensors if "mlp" in name)[0]
    tensors[name].view(-1).view(torch.int32)[-1] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_the_digest_of_the_base_is_one_for_every_stage_and_world_and_tells_one_bit(
    ranks: Callable[[int], Any],
    overrides_of: OverridesOf,
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def digest(world_size: int, stage: int, *more: str) -> str:
        found = ranks(world_size).run(
            base_digest, overrides=overrides_of(stage, "adapter=lora", *more), run_dir=str(tmp_path / "run")
        )
        assert len(set(found)) == 1
        return found[0]

    shapes = [(2, 0), (2, 2), (2, 3), (1, 1), (1, 3)]
    assert len({digest(*shape) for shape in shapes}) == 1
    other = with_a_changed_weight(make_model(attention_dropout=0.1), tmp_path / "other")
    assert digest(2, 3, f"model.name_or_path={other}") != digest(2, 3)


def refused(rank: Any, overrides: list[str], run_dir: str) -> str:
    from tunesmith.train.errors import TrainingError

    try:
        rank.train(overrides, run_dir)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.row(19)
def test_another_base_or_other_settings_are_refused_with_their_names_on_all_ranks(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    def ask(*more: str) -> str:
        asked = ranks(2).run(refused, overrides=overrides_of(2, "adapter=lora", *more), run_dir=str(tmp_path / "run"))
        assert asked[0] == asked[1]
        return asked[0]

    assert ask("schedule.max_steps=2") == ""
    other = with_a_changed_weight(make_model(attention_dropout=0.1), tmp_path / "other")
    assert "base_weights: was " in ask(f"model.name_or_path={other}")
    moved = tmp_path / "moved"
    shutil.copytree(make_model(attention_dropout=0.1), moved)
    assert ask(f"model.name_or_path={moved}", "schedule.max_steps=3") == ""  # the same weights in another place
    drifted = ask("optimizer.learning_rate=1e-3", "seed=1")
    assert "optimizer.learning_rate: was 0.003, is 0.001" in drifted
    assert "seed: was 0, is 1" in drifted
    assert ask("optimizer.learning_rate=1e-3", "resume.allow=[optimizer.learning_rate]") == ""


def first_save(rank: Any, overrides: list[str], run_dir: str) -> dict[str, float]:
    """On every rank: the seconds of a run's first save, on a disk that takes its time in the background."""
    found, fsync = list[dict[str, float]](), os.fsync

    def slow_in_background(file: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        fsync(file)

    os.fsync = slow_in_background
    try:
        with rank.ready(overrides, run_dir) as (loop, recorder):
            recorder.saved = lambda step, **seconds: found.append(seconds)
            with rank.faults(loop, "slow:phase=forward,step=10,last_step=25,seconds=0.1"):
                while not found:
                    loop.step()
    finally:
        os.fsync = fsync
    return found[0]


def test_the_loop_does_not_wait_for_the_disk_while_a_save_is_written(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path
) -> None:
    saves = ("checkpoint.async_save=true", "checkpoint.every_steps=10", "schedule.max_steps=100", "adapter=lora")
    found = ranks(2).run(first_save, overrides=overrides_of(2, *saves), run_dir=str(tmp_path / "run"))[0]
    assert found["stall_seconds"] < found["save_seconds"] / 2
