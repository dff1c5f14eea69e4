"""The report: the Pareto set, a page that needs and runs nothing, pictures that show what there is."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.launch.sweeping import axes
from tunesmith.launch.sweeping.hours import note_end, note_start
from tunesmith.launch.sweeping.page import render_page
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.report import write_report
from tunesmith.launch.sweeping.result import SweepResult, TrialRow
from tunesmith.launch.sweeping.trials import Trials

HOSTILE = "<script>alert(1)</script>\"'&amp;"
Plans = Callable[..., SweepPlan]
Studies = Callable[[SweepPlan], Trials]


def result_of(values: list[list[float] | None], **changes: object) -> SweepResult:
    """A sweep with a learning rate and a text as parameters."""
    rows = [
        TrialRow(
            number=number,
            status="failed" if value is None else "finished",
            params={"optimizer.learning_rate": 10.0**-number, "name": HOSTILE if number % 2 else "plain"},
            values=value,
            figures={},
            seconds=1.0,
            cause=f"{HOSTILE} died" if value is None else None,
            curve=[] if value is None else [(1, value[0] + 1), (2, value[0])],
            folder="/runs/x",
        )
        for number, value in enumerate(values)
    ]
    result = SweepResult(
        name=HOSTILE,
        status="finished",
        metrics={"eval/loss": "minimize"},
        rows=rows,
        best=[0],
        importances={"optimizer.learning_rate": 0.9, "name": 0.1},
        hours=1.0,
        gpu_hours=0.0,
        log_keys=frozenset({"optimizer.learning_rate"}),
        num_trials=len(rows),
        curve_metric="eval/loss",
    )
    return replace(result, **changes)  # type: ignore[arg-type]


def test_the_page_escapes_all_runs_nothing_and_loads_nothing() -> None:
    page = render_page(result_of([[1.0], [2.0], None, [3.0], [1.5]]), {0: f"deepspeed {HOSTILE}"})
    assert "<script" not in page
    assert not re.search(r"(src|href)=|https?://|url\(", page)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert page.count("<figure") == 6  # history, curves, parallel coordinates, importances, two slices


@pytest.mark.parametrize("values", [[], [None], [[1.0]], [[1.0], [1.0]], [None, [2.0], None]])
def test_a_page_of_little_is_a_page(values: list[list[float] | None]) -> None:
    page = render_page(result_of(values, best=[], importances={}), {})
    assert page.count("<h1>") == 1
    assert "nan" not in page


def test_a_diverged_trial_does_not_squash_the_others() -> None:
    assert axes.worth_showing([1.0, 1.2, 1.4, 1.5, 900.0], "minimize") == [1.0, 1.2, 1.4, 1.5]
    assert axes.worth_showing([0.9, 0.8, 0.7, 0.75, -50.0], "maximize") == [0.9, 0.8, 0.7, 0.75]
    assert axes.worth_showing([2.0, 2.0, 2.0, 5.0], "minimize") == [2.0, 2.0, 2.0, 5.0]


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-3), (1e-5, 0.3), (0.9, 1.1), (3.0, 3.0)])
def test_an_axis_in_the_logarithm_has_its_values_and_round_numbers(low: float, high: float) -> None:
    axis = axes.axis([low, high], is_log=True)
    assert axis.low <= low <= high <= axis.high
    assert 0 <= axis.share(low) <= axis.share(high) <= 1
    assert axis.ticks


def test_of_two_metrics_the_pareto_set_is_written(plan_of: Plans, trials_of: Studies) -> None:
    plan = plan_of(["seed=1,2,3,4"], metric=["eval/loss", "throughput/tokens_per_second"])
    trials = trials_of(plan)
    for values in ([1.0, 10.0], [2.0, 30.0], [3.0, 20.0]):  # the third is beaten by the second in both
        trial = trials.claim_next(may_begin=True)
        assert trial is not None
        note_start(trial, 0)
        note_end(trial)
        trials.study.tell(trial, values)
        trials.give_back(trial.number)
    result = write_report(plan, trials)
    assert result.best == [0, 1]
    assert json.loads((plan.folder / "sweep.json").read_text())["best"] == [0, 1]
    names = sorted(path.name for path in Path(plan.folder / "conf/exp").iterdir())
    assert names == [f"{plan.study_name}-0.yaml", f"{plan.study_name}-1.yaml"]
    assert "orange: the Pareto set" in (plan.folder / "sweep.html").read_text(encoding="utf-8")
    assert result.status == "unfinished"
