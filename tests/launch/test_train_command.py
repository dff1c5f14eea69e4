"""The command itself: light until the config is checked, and quiet on the other ranks when a person made a mistake."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matrices import covered

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Device
from tunesmith.train.errors import ConfigError
from tunesmith.train.ranks.distributed import World, choose_device

Launch = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = Path(__file__).parents[2] / "launch/train.py"
HEAVY = ("torch", "transformers", "deepspeed", "peft", "wandb", "numpy", "datasets", "matplotlib")

# A sitecustomize: at its end, whatever way it ends, the process says what it had imported.
SPY = f"""
import os, sys
def say():
    found = sorted(set({HEAVY!r}) & set(sys.modules))
    os.write(2, f"imported: {{found}}\\n".encode())
ended = os._exit
def end(code):
    say()
    ended(code)
os._exit = end
import atexit
atexit.register(say)
"""


def spied(folder: Path) -> str:
    """A PYTHONPATH with the spy on it."""
    (folder / "sitecustomize.py").write_text(SPY)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def test_help_names_every_group(launch: Launch) -> None:
    done = launch("forked", "train", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "deepspeed launch/train.py +exp=support_bot" in done.stdout
    for line in (
        "engine      ddp | zero1",
        "exp         debug |",
        "adapter     dora | last_layers | lora",
        "docs/config.md",
    ):
        assert line in done.stdout


def test_help_lists_own_options_too(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "mine/exp").mkdir(parents=True)
    (tmp_path / "mine/exp/my_bot.yaml").write_text("# @package _global_\nseed: 1\n")
    assert "my_bot" in launch("forked", "train", "--config-dir", "mine", "--help").stdout
    assert launch("forked", "train", "--config-dir=nope", "--help").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [["optimizer.lr=1"], ["+exp=debug", "batch.global_batch_size=0"], ["--help"], ["+exp=debug", "--cfg"], ["-m"]],
)
def test_nothing_heavy_is_imported_before_the_config_is_checked(arguments: list[str], tmp_path: Path) -> None:
    """No torch: so no CUDA context and no process group either."""
    environment = os.environ | {
        "PYTHONPATH": spied(tmp_path),
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "203.0.113.1",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert "imported: []" in done.stderr
    assert (done.returncode == 0) is (arguments[-1] in ("--help", "--cfg"))


def test_the_spy_would_see_torch(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": spied(tmp_path)}
    code = [sys.executable, "-c", "import numpy"]
    assert "imported: ['numpy']" in subprocess.run(code, env=environment, capture_output=True, text=True).stderr


def test_cfg_prints_a_config_that_is_the_one_composed(launch: Launch) -> None:
    import yaml

    done = launch("forked", "train", "+exp=debug", "seed=7", "--cfg")
    assert yaml.safe_load(done.stdout) == compose_config(["+exp=debug", "seed=7"]).resolved


def test_the_local_rank_that_deepspeed_appends_is_no_override(launch: Launch) -> None:
    done = launch("forked", "train", "--local_rank=0", "+exp=debug", "--cfg")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("gpus", [1, 4])
def test_more_ranks_than_gpus_are_refused_before_a_gpu_is_touched(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    world = World(rank=3, world_size=8, local_rank=3, local_world_size=8)
    with pytest.raises(ConfigError) as caught:
        choose_device(Device.auto, world)
    what_line, at_line, do_line = str(caught.value).splitlines()
    assert f"8 ranks were started on {os.uname().nodename}, which has {gpus} GPU(s)." in what_line
    assert "--num_gpus" in at_line
    assert f"start {gpus} rank(s) per node" in do_line
    assert not torch.cuda.is_initialized()


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = World(rank=3, world_size=4, local_rank=1, local_world_size=2)
    assert choose_device(Device.auto, world) == torch.device("cuda", 1)
    assert choose_device(Device.cpu, world) == torch.device("cpu")
    assert not torch.cuda.is_initialized()


RANKS_MISTAKES = [
    ("torchrun", ["data.train=nope.jsonl"], "DataError: there is no file or folder nope.jsonl."),
    ("deepspeed", ["batch.micro_batch_size=4"], "ConfigError: global_batch_size=4 does not divide into forwards of 8"),
    ("deepspeed", ["optimizer.lr=1"], "ConfigError: there is no setting 'optimizer.lr'."),
]


@pytest.mark.cold
@pytest.mark.parametrize(("launcher", "overrides", "problem"), covered(RANKS_MISTAKES, RANKS_MISTAKES[2:]))
def test_two_ranks_say_a_mistake_once_and_end(
    launch: Launch, tmp_path: Path, launcher: str, overrides: list[str], problem: str
) -> None:
    done = launch(launcher, "train", "+exp=debug", "output_dir=run", *overrides, timeout=120)  # no rank waits for long
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(problem) == 1
    assert (done.stdout + done.stderr).count("  do: ") == 1
    assert not (tmp_path / "run").exists()
