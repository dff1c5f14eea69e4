"""Plans of sweeps, and slots where trials are small programs that leave what a training leaves."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tunesmith.launch.sweeping import driver
from tunesmith.launch.sweeping.driver import SweepDriver
from tunesmith.launch.sweeping.plan import SweepPlan, claim_folder, make_plan
from tunesmith.launch.sweeping.settings import SweeperConfig
from tunesmith.launch.sweeping.slots import LocalTrial
from tunesmith.launch.sweeping.trials import Trials

# A training in small: eval/loss by step as its learning rate has it, then the summary. SIGTERM saves and ends with 75.
TRAINING = """
import json, math, os, pathlib, signal, sys, time
folder, rate, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
(folder / "model").mkdir(parents=True, exist_ok=True)
def stop(*_):
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
with (folder / "starts").open("a") as file:
    file.write("x")
loss = abs(math.log10(rate) + 3)
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(1, 6):
        file.write(json.dumps({"step": step, "seconds": step, "eval/loss": loss + 1 / step}) + "\\n")
        file.flush()
        time.sleep(seconds / 5)
if rate > 0.5:
    (folder / "failure.json").write_text(json.dumps({"cause": "rank 0 ran out of memory"}))
    sys.exit(1)
summary = {"status": "finished", "eval": {"loss": loss}, "tokens_per_second": 1000 * rate, "peak_memory_gib": 1.0}
(folder / "summary.json").write_text(json.dumps(summary))
"""


class Programs:
    """Slots that start TRAINING instead of launch/train.py."""

    def __init__(self, plan: SweepPlan, seconds: float, slow: str | None) -> None:
        self._plan, self._seconds, self._slow = plan, seconds, slow

    def has_room(self) -> bool:
        return True

    def start(self, number: int, overrides: list[str], job_id: str | None) -> LocalTrial:
        rate = next(text.split("=")[1] for text in overrides if text.startswith("optimizer.learning_rate="))
        folder = str(self._plan.trial_folder(number))
        seconds = 0.0 if self._slow not in (None, rate) else self._seconds
        command = [sys.executable, "-c", TRAINING, folder, rate, str(seconds)]
        return LocalTrial(subprocess.Popen(command))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of seconds, not hours: the driver looks more often."""
    for name, seconds in {"LOOK_SECONDS": 0.05, "FOLLOW_SECONDS": 0.2, "FILL_SECONDS": 0.3}.items():
        monkeypatch.setattr(driver, name, seconds)


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SweepPlan]:
    """plan_of(["optimizer.learning_rate=1e-3,1e-2"], n_trials=5) is the plan of a sweep in an empty folder."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)

    def make(searched: list[str], **settings: Any) -> SweepPlan:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweeperConfig), settings))
        assert isinstance(config, SweeperConfig)
        plan = make_plan(config, ["+exp=debug", *searched], None)
        claim_folder(plan)
        return plan

    return make


@pytest.fixture
def trials_of() -> Iterator[Callable[[SweepPlan], Trials]]:
    """trials_of(plan) opens its database, as one driver does."""
    opened: list[Trials] = []

    def open_trials(plan: SweepPlan) -> Trials:
        opened.append(Trials(plan))
        return opened[-1]

    yield open_trials
    for trials in opened:
        trials.close()


@pytest.fixture
def driver_of(trials_of: Callable[[SweepPlan], Trials]) -> Callable[..., SweepDriver]:
    """driver_of(plan, seconds=1) is a driver of its own, whose trials take a second; slow="0.4": only that rate's."""
    return lambda plan, seconds=0.0, slow=None: SweepDriver(plan, trials_of(plan), Programs(plan, seconds, slow))


@pytest.fixture
def report_of() -> Callable[[SweepPlan], dict[str, Any]]:
    """report_of(plan) is its sweep.json."""
    return lambda plan: json.loads((plan.folder / "sweep.json").read_text(encoding="utf-8"))


@pytest.fixture
def starts_of() -> Callable[[SweepPlan], dict[int, int]]:
    """starts_of(plan) is how often the program of each trial was started."""
    return lambda plan: {
        int(path.parent.name): len(path.read_text()) for path in sorted(plan.folder.glob("trials/*/starts"))
    }
