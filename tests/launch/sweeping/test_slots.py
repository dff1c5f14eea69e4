"""Trials beside each other: GPUs that are one trial's alone, the launcher's command, the environment."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from tunesmith.launch.sweeping import slots, submitit_slots
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.slots import (
    LocalSlots,
    LocalTrial,
    NotNow,
    is_busy,
    training_command,
    trial_environment,
    visible_gpus,
)
from tunesmith.launch.sweeping.submitit_slots import TrialJob
from tunesmith.train.config.config import Device
from tunesmith.train.errors import ConfigError

RATES = "optimizer.learning_rate=1e-3,1e-2"


@pytest.fixture
def two_gpus(plan_of: Callable[..., SweepPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepPlan:
    """A plan as on a machine that has GPUs 2 and 3. Trials print their GPUs, wait for a file, and end."""
    plan = replace(plan_of([RATES], n_jobs=2), num_gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(slots, "_lock_folder", lambda: tmp_path)
    wait = (
        "import os, pathlib, time\nprint(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.05)"
    )
    monkeypatch.setattr(slots, "training_command", lambda *_, **__: [sys.executable, "-c", wait])
    monkeypatch.setattr(slots, "supervised", lambda command: command)
    return plan


def test_each_trial_has_a_gpu_of_its_own_over_all_sweeps(two_gpus: SweepPlan, tmp_path: Path) -> None:
    mine, another = LocalSlots(two_gpus), LocalSlots(two_gpus)
    assert two_gpus.ranks == 1
    first = mine.start(0, [], None)
    second = another.start(1, [], None)
    assert (list(first.locks), list(second.locks)) == (["2"], ["3"])
    assert not mine.has_room()
    assert not another.has_room()
    (tmp_path / "go").touch()
    for attempt in (first, second):
        assert attempt.process.wait(30) == 0
        assert attempt.has_ended()
    assert mine.has_room()
    assert [two_gpus.log(number).read_text() for number in (0, 1)] == ["2\n", "3\n"]


def test_a_trial_of_two_ranks_waits_for_two_gpus(two_gpus: SweepPlan, tmp_path: Path) -> None:
    slots = LocalSlots(replace(two_gpus, settings=replace(two_gpus.settings, n_jobs=1)))
    with FileLock(tmp_path / "gpu-3.lock"):
        assert not slots.has_room()
    assert slots.has_room()


def test_a_job_of_submitit_trains_until_its_file_asks_it_to_stop(
    two_gpus: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitit_slots, "training_command", slots.training_command)
    finished, stopped = (TrialJob([], None, tmp_path / "log", tmp_path / name, 1, Device.cpu) for name in "fs")
    threading.Timer(1.0, (tmp_path / "s").touch).start()
    assert stopped() == 75
    (tmp_path / "go").touch()
    assert finished() == 0
    assert (tmp_path / "log").read_text() == "2,3\n" * 2


def test_a_trial_whose_gpus_are_taken_between_the_look_and_the_start_waits(two_gpus: SweepPlan, tmp_path: Path) -> None:
    slots = LocalSlots(replace(two_gpus, settings=replace(two_gpus.settings, n_jobs=1)))
    assert slots.has_room()
    with FileLock(tmp_path / "gpu-3.lock"), pytest.raises(NotNow, match="faster to take its GPUs"):
        slots.start(0, [], None)
    assert slots.has_room(), "the GPU that was free is free again"
    assert not two_gpus.log(0).exists()


def test_a_trial_that_is_stopped_before_its_supervisor_listens_was_stopped() -> None:
    asked, killed = (
        LocalTrial(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])) for _ in range(2)
    )
    asked.stop()
    killed.process.kill()
    for attempt in (asked, killed):
        assert attempt.process.wait(30) < 0
    assert asked.exit_code() == 75
    assert killed.exit_code() == -9, "nobody asked it to end"


def test_gpus_are_named_as_the_environment_names_them(two_gpus: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus(2) == ["2", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(3) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a,GPU-2b")
    with pytest.raises(ConfigError, match="deepspeed takes GPUs by number, not GPU-1a"):
        LocalSlots(replace(two_gpus, settings=replace(two_gpus.settings, n_jobs=1)))


def test_the_launcher_is_the_ordinary_one() -> None:
    one = training_command(1, None, ["+exp=debug"], gpus=[], port=1)
    assert one[0] == sys.executable
    assert one[1].endswith("launch/train.py")
    two = training_command(2, Path("/my conf"), ["+exp=debug"], gpus=["4", "6"], port=29600)
    assert two[1:5] == ["--include", "localhost:4,6", "--master_port", "29600"]
    assert two[-3:] == ["--config-dir", "/my conf", "+exp=debug"]
    assert training_command(2, None, [], gpus=[], port=1)[1:3] == ["--num_gpus", "2"]


def test_a_trial_is_no_rank_of_whatever_started_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in slots.RANK_VARIABLES:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("HF_HOME", "/models")
    environment = trial_environment(29501)
    assert environment["MASTER_PORT"] == "29501"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & set(environment)
    assert environment["HF_HOME"] == "/models"


def test_a_folder_is_busy_while_a_training_writes_to_it(tmp_path: Path) -> None:
    assert not is_busy(tmp_path)
    with FileLock(tmp_path / ".tunesmith-lock"):
        assert is_busy(tmp_path)
    assert not is_busy(tmp_path)
