"""launch/sweep.py, as a person runs it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.launch.sweeping.command import run, sweep
from tunesmith.launch.sweeping.overrides import read_command_line, read_settings
from tunesmith.launch.sweeping.plan import make_plan
from tunesmith.launch.sweeping.settings import Sampler
from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import CONF_DIR


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.learning_rate=1e-3"], "there is nothing to search"),
        (["optimizer.learning_rat=1,2"], "Did you mean optimizer.learning_rate?"),
        (["seed=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials (command line: hydra.sweeper.n_trials=0)"),
        (["seed=1,2", "hydra.sweeper.n_trails=3"], "Did you mean n_trials?"),
        (["seed=1,2", "hydra.sweeper.n_trials=many"], "hydra.sweeper.n_trials (command line:"),
        (["seed=1,2", "hydra.sweeper.max_hours=0"], "max_hours must be above 0"),
        (["seed=1,2", "hydra.sweeper.metric=loss"], "'loss' is no figure of a finished run"),
        (["seed=1,2", "hydra.sweeper.storage=foo://bar"], "the database of the trials cannot be used"),
        (["seed=1,2", "hydra/sweeper=bayes"], "choose one of grid, random, optuna"),
        (["seed=1,2", "+sweep=lorra"], "Did you mean lora?"),
        (["seed=1,2", "+sweep=learning_rate", "--cfg"], "'--cfg' is not understood"),
        (["+sweep=learning_rate", "+sweep=lora"], "there are several search spaces"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError) as error:
        run(["+exp=debug", *overrides], None)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_search_space_is_placed_in_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()
    path = tmp_path / "sweep/mine.yaml"
    path.write_text("# @package hydra.sweeper\nparams:\n  seed: 1,2\nn_trials: -1\n")
    with pytest.raises(ConfigError) as error:
        run(["+exp=debug", "+sweep=mine"], tmp_path)
    assert error.value.at == f"hydra.sweeper.n_trials ({path}:4)"


def test_without_m_it_says_so() -> None:
    with pytest.raises(ConfigError, match="a sweep is many trainings, which -m says"):
        sweep(["+exp=debug", "seed=1,2"], "")


def test_a_search_space_is_not_for_one_training() -> None:
    with pytest.raises(ConfigError, match="a search space is for many trainings"):
        compose_config(["+exp=debug", "+sweep=lora"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "sweep").glob("*.yaml")))
def test_each_search_space_that_ships_fits_the_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    typed = read_settings(read_command_line(["hydra/sweeper=random", f"+sweep={name}"], [CONF_DIR]))
    assert typed.sampler is Sampler.random, "the command line has the last word"
    plan = make_plan(read_settings(read_command_line([f"+sweep={name}"], [CONF_DIR])), ["+exp=debug"], None)
    assert plan.settings.sampler is Sampler.tpe
    assert plan.num_trials == plan.settings.n_trials


@pytest.mark.slow
def test_two_trainings_side_by_side_and_one_that_diverges(launch: Callable[..., Any], tmp_path: Path) -> None:
    short = ("schedule.max_steps=2", "evaluate.generate=false", "batch.sequence_length=128", "checkpoint.at_end=false")
    searched = ("optimizer.learning_rate=1e-3,1e30", "optimizer.max_skipped_steps=1", "hydra.sweeper.n_jobs=2")
    done = launch("python", "sweep", "-m", "+exp=debug", *short, *searched, "output_dir=out", "track.group=null")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out/sweep.json").read_text(encoding="utf-8"))
    good, bad = report["trials"]
    assert (good["status"], report["best"]) == ("finished", [0])
    assert bad["status"] == "failed", done.stdout
    assert "not finite" in bad["cause"] or "diverged" in bad["cause"]
    assert good["values"] == [json.loads((tmp_path / "out/trials/0/summary.json").read_text())["eval"]["loss"]]
    assert os.path.isfile(tmp_path / "out/sweep.html")
