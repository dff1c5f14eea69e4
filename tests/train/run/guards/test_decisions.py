"""When the loop evaluates, saves, keeps the best and stops: scripted eval losses through the real loop."""

from pathlib import Path

import pytest

OVERRIDES = (
    "+exp=debug",
    "engine=ddp",
    "model=hub",
    "batch.sequence_length=128",
    "data.validation_fraction=0.2",
    "data.validation=[]",
    "engine.precision=fp32",
)


def follow(rank, overrides: list[str], run_dir: str, script: list[float], figure: str) -> dict[str, object]:
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    from dataclasses import replace

    from worker import ScriptedObjective

    from tunesmith.train.run.loop import Loop

    with rank.ready(overrides, run_dir) as (made, _):
        objective = ScriptedObjective(made, script, figure)
        loop = Loop(replace(made.run, objective=objective), made.session)
        loop.train()
        return {
            "evaluated_at": objective.evaluated_at,
            "steps": loop.session.state.step,
            "best": [loop.session.state.best_step, loop.session.state.best_metric],
            "kept": loop.session.checkpoints.steps(),
            "drafts": sorted(path.name for path in Path(run_dir, "best").iterdir() if path.is_dir()),
        }


@pytest.fixture
def scripted(ranks, make_model, make_records, data_cache, tmp_path):
    def run(script: list[float], *overrides: str, figure: str = "loss") -> dict[str, object]:
        everything = [
            *OVERRIDES,
            f"model.name_or_path={make_model()}",
            f"data.train={make_records(40)}",
            f"data.cache_dir={data_cache}",
            *overrides,
        ]
        folder = str(tmp_path / "run")
        return ranks(1).run(follow, overrides=everything, run_dir=folder, script=script, figure=figure)[0]

    return run


def test_the_best_is_the_lowest_eval_loss_and_its_weights_are_the_draft(scripted):
    found = scripted([3.0, 1.0, 2.0, 1.5], "schedule.max_steps=8", "evaluate.every_steps=2", "checkpoint.every_steps=2")
    assert found["evaluated_at"] == [2, 4, 6, 8]
    assert found["best"] == [4, 1.0]
    assert found["drafts"] == ["step-000004"]
    assert found["kept"] == [4, 6, 8]  # the last two, and the best


def test_patience_counts_evaluations_without_a_better_loss(scripted):
    script = [3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 9.0]  # equal is not better
    found = scripted(script, "schedule.max_steps=40", "evaluate.every_steps=3", "evaluate.patience=2")
    assert found["evaluated_at"] == [3, 6, 9, 12, 15, 18]
    assert found["steps"] == 18
    assert found["best"] == [12, 1.9]


def test_the_last_step_is_evaluated_once(scripted):
    found = scripted([2.0, 1.0], "schedule.max_steps=5", "evaluate.every_steps=3", "checkpoint.every_steps=null")
    assert found["evaluated_at"] == [3, 5]
    assert found["kept"] == [5]


def test_another_figure_can_decide_and_is_better_when_it_is_higher(scripted):
    own = ("schedule.max_steps=4", "evaluate.every_steps=2", "evaluate.metric=eval/token_accuracy")
    assert scripted([0.5, 0.25], *own, figure="token_accuracy")["best"] == [2, 0.5]


def test_a_nan_eval_loss_is_never_the_best(scripted):
    found = scripted([float("nan"), 2.0, float("nan")], "schedule.max_steps=6", "evaluate.every_steps=2")
    assert found["best"] == [4, 2.0]
