"""What is refused before the first trial, and how a sweep is known again."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.launch.sweeping.plan import SweepPlan, claim_folder, make_plan, quoted
from tunesmith.launch.sweeping.settings import SweeperConfig
from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import ConfigError

RATES = "optimizer.learning_rate=1e-3,1e-2"
Plans = Callable[..., SweepPlan]


@pytest.mark.parametrize(
    ("overrides", "settings", "said"),
    [
        (["optimizer.learning_rat=1,2"], {}, "there is no setting 'optimizer.learning_rat'"),
        (["adapter=lora,lora2"], {}, "adapter has no option 'lora2'"),
        (["optimizer.learning_rate=1,-1"], {}, "learning_rate must be above 0, not -1.0"),
        (["output_dir=a,b"], {}, "output_dir is each trial's own"),
        (["optimizer.learning_rate=interval(1,2)"], {}, "a grid has no end"),
        ([RATES], {"max_gpu_hours": 1.0}, "the trials use no GPU"),
        ([RATES, "evaluate.every_steps=null"], {"pruner": "median"}, "needs evaluations to judge by"),
        ([RATES, "evaluate.generate=false"], {"metric": "eval/exact_match"}, "needs answers"),
        ([RATES, "cluster=slurm"], {"ranks_per_trial": 2}, "the ranks of a SLURM job are"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(
    plan_of: Plans, tmp_path: Path, overrides: list[str], settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(overrides, **settings)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_the_same_command_finds_its_sweep_and_another_does_not(plan_of: Plans) -> None:
    plan = plan_of([RATES])
    assert plan_of([RATES], n_trials=1, n_jobs=2).folder == plan.folder
    assert plan_of([RATES, "seed=1"]).folder != plan.folder
    with pytest.raises(ConfigError, match="holds a sweep of another space"):
        plan_of(["optimizer.learning_rate=1e-3,1e-4", f"output_dir={plan.folder}"], study_name=plan.study_name)


def test_a_folder_of_something_else_is_not_used(plan_of: Plans, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no sweep"):
        plan_of([RATES, "output_dir=mine"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("folder", ["plain", "a b", "it's", "a=b,c", "${x}", "back\\slash", "trailing\\", 'a"b', "{[("])
def test_a_trial_gets_its_folder_whatever_its_name(plan_of: Plans, tmp_path: Path, folder: str) -> None:
    overrides = ["+exp=debug", RATES, f"output_dir={quoted(str(tmp_path / folder))}"]
    if "${" in folder:
        with pytest.raises(ConfigError):  # a reference for Hydra, wherever it stands
            make_plan(SweeperConfig(), overrides, None)
        return
    plan = make_plan(SweeperConfig(), overrides, None)
    claim_folder(plan)
    config = compose_config(plan.overrides(3, {"optimizer.learning_rate": "1e-3"}), None).config
    assert config.output_dir == str(tmp_path / folder / "trials" / "3")
    assert config.track.group == plan.study_name


def test_any_name_of_a_run_gives_a_sweep_and_trials_that_compose(plan_of: Plans) -> None:
    plan = plan_of([RATES, f"name={quoted('Tölle Läufe ' + 80 * 'x')}"])
    config = compose_config(plan.overrides(123, {"optimizer.learning_rate": "1e-3"}), None).config
    assert config.name.endswith("x-123")
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", plan.study_name)
    assert config.track.group == plan.study_name


def test_a_grid_is_no_longer_than_its_points(plan_of: Plans) -> None:
    assert plan_of([RATES]).num_trials == 2
    assert plan_of([RATES], n_trials=5).num_trials == 2
    assert plan_of([RATES], sampler="random").num_trials == 2
    assert plan_of(["optimizer.learning_rate=interval(1e-3,1e-2)"], sampler="tpe").num_trials == 20
