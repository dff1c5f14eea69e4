"""The loop of a sweep, with small programs as trials: claims, pruning, budgets, failures, drivers that are killed."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

from tunesmith.launch.sweeping.driver import SweepDriver
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.trials import Trials
from tunesmith.train.config.compose import compose_config

RATES = "optimizer.learning_rate=1e-4,1e-3,1e-2"
ANY_RATE = "optimizer.learning_rate=tag(log,interval(1e-5,1e-1))"
Report = Callable[[SweepPlan], dict[str, Any]]
Plans = Callable[..., SweepPlan]
Drivers = Callable[..., SweepDriver]
Studies = Callable[[SweepPlan], Trials]
Starts = Callable[[SweepPlan], dict[int, int]]


def test_a_grid_is_run_once_each_and_its_best_becomes_an_experiment(
    plan_of: Plans, driver_of: Drivers, report_of: Report, starts_of: Starts
) -> None:
    plan = plan_of([RATES], n_jobs=2)
    driver_of(plan).run()
    driver_of(plan).run()  # the same command again
    report = report_of(plan)
    assert [trial["params"]["optimizer.learning_rate"] for trial in report["trials"]] == ["0.0001", "0.001", "0.01"]
    assert report["status"] == "finished"
    assert starts_of(plan) == {0: 1, 1: 1, 2: 1}
    assert report["best"] == [1]  # the loss is lowest at 1e-3
    again = compose_config([f"+exp={plan.study_name}"], plan.folder / "conf").resolved
    trial = compose_config(plan.overrides(1, {"optimizer.learning_rate": "0.001"})).resolved
    for tree in (again, trial):
        tree["name"] = tree["output_dir"] = tree["track"]["group"] = None
    assert again == trial


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(
    plan_of: Plans, driver_of: Drivers, report_of: Report
) -> None:
    plan = plan_of(["optimizer.learning_rate=0.9,-1,1e-3"])
    driver_of(plan).run()
    first, second, third = report_of(plan)["trials"]
    assert (first["status"], first["cause"]) == ("failed", "rank 0 ran out of memory")
    assert (second["status"], second["cause"]) == ("failed", "ConfigError: learning_rate must be above 0, not -1.0.")
    assert third["status"] == "finished"
    page = (plan.folder / "sweep.html").read_text(encoding="utf-8")
    assert "rank 0 ran out of memory" in page


def test_two_drivers_share_the_trials(
    plan_of: Plans, driver_of: Drivers, starts_of: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of([ANY_RATE], sampler="tpe", n_trials=8, n_startup_trials=3)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # a thread may not
    threads = [threading.Thread(target=driver_of(plan, seconds=0.2).run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert starts_of(plan) == dict.fromkeys(range(8), 1)


def test_what_a_killed_driver_leaves_goes_on_and_what_a_living_one_runs_is_left_alone(
    plan_of: Plans, driver_of: Drivers, starts_of: Starts, trials_of: Studies
) -> None:
    plan = plan_of([RATES])
    code = (  # another process claims two trials: it is killed, and its locks with it
        "import sys, time; sys.path.insert(0, sys.argv[1]); from tests_plan import plan\n"
        "from tunesmith.launch.sweeping.trials import Trials\n"
        "trials = Trials(plan()); print(trials.claim_next(may_begin=True).number, flush=True); time.sleep(60)"
    )
    module = Path("tests_plan.py")
    module.write_text(
        "from tunesmith.launch.sweeping.plan import make_plan\n"
        "from tunesmith.launch.sweeping.settings import SweeperConfig\n"
        f"def plan(): return make_plan(SweeperConfig(), ['+exp=debug', {RATES!r}], None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(Path.cwd())], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "0\n"
        mine = trials_of(plan)
        second = mine.claim_next(may_begin=True)
        assert second is not None
        assert second.number == 1, "trial 0 is held by a living driver"
        other.kill()
    taken = mine.claim_next(may_begin=False)
    assert taken is not None
    assert (taken.number, taken.params) == (0, {"optimizer.learning_rate": "0.0001"})
    mine.close()
    driver_of(plan).run()
    assert starts_of(plan) == {0: 1, 1: 1, 2: 1}


def test_a_signal_stops_the_trials_and_the_same_command_goes_on(
    plan_of: Plans, driver_of: Drivers, report_of: Report, starts_of: Starts
) -> None:
    plan = plan_of([RATES], n_jobs=2)
    driver = driver_of(plan, seconds=20.0)
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    driver.run()
    assert driver.asked == "SIGTERM"
    assert [trial["status"] for trial in report_of(plan)["trials"]] == ["stopped", "stopped"]
    driver.trials.close()
    driver_of(plan).run()
    assert starts_of(plan) == {0: 2, 1: 2, 2: 1}
    assert report_of(plan)["status"] == "finished"


@pytest.mark.parametrize("pruner", covered(["median", "asha", "none"], ["asha"]))
def test_a_hopeless_trial_is_stopped_early(plan_of: Plans, driver_of: Drivers, report_of: Report, pruner: str) -> None:
    plan = plan_of([f"{RATES},0.4", "evaluate.every_steps=1"], pruner=pruner, reduction_factor=2)
    driver_of(plan, seconds=3.0 if pruner == "none" else 60.0, slow="0.4").run()
    *others, last = report_of(plan)["trials"]
    assert [trial["status"] for trial in others] == ["finished"] * 3
    assert last["status"] == ("finished" if pruner == "none" else "pruned")
    assert last["seconds"] < 60


def test_no_trial_is_started_once_the_hours_are_spent(plan_of: Plans, driver_of: Drivers, report_of: Report) -> None:
    plan = plan_of([RATES], max_hours=1e-4)  # 0.36 s
    driver = driver_of(plan, seconds=0.5)
    driver.run()
    assert [trial["status"] for trial in report_of(plan)["trials"]] == ["finished"]
    assert driver.budget_spent == "hydra.sweeper.max_hours=0.0001 is spent"
    driver_of(plan).run()  # nor by the next command
    assert len(report_of(plan)["trials"]) == 1
