"""Does Bayesian search find better settings than random search, and does a sweep survive its drivers?

    python bench/sweep_search.py

Twelve short trainings of the tiny model on the example data by TPE, and twelve by random search, over the same space.
The TPE sweep is done by two drivers on one database; both are killed (-9) on the way, and a third one finishes it. No
trial that had finished may run again. Writes bench/results/sweep_search.json. A CPU does.
"""

import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).absolute().parents[1]
RESULT = ROOT / "bench" / "results" / "sweep_search.json"
TRIALS = 12
SPACE = ["optimizer.learning_rate=tag(log,interval(1e-5,3e-1))", "optimizer.beta2=choice(0.9,0.95,0.99)"]
SETTINGS = [
    *("+exp=debug", "schedule.max_steps=10", "batch.sequence_length=256", "evaluate.every_steps=2"),
    *("evaluate.generate=false", "checkpoint.every_steps=2", "checkpoint.at_end=false"),
]
WAIT_SECONDS = 1800.0


def start(folder: Path, sampler: str, n_jobs: int, log: Path) -> subprocess.Popen[bytes]:
    """A driver of the sweep in the folder."""
    own = [f"output_dir={folder}", f"hydra/sweeper={sampler}", f"hydra.sweeper.study_name={sampler}"]
    counts = [f"hydra.sweeper.n_trials={TRIALS}", f"hydra.sweeper.n_jobs={n_jobs}", "hydra.sweeper.n_startup_trials=4"]
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "-m", *SETTINGS, *SPACE, *own, *counts]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def trials(folder: Path) -> list[dict[str, Any]]:
    path = folder / "sweep.json"
    return json.loads(path.read_text(encoding="utf-8"))["trials"] if path.is_file() else []


def finished(folder: Path) -> dict[int, float]:
    """Finished trials, with the time at which their summary was written."""
    numbers = [trial["number"] for trial in trials(folder) if trial["status"] == "finished"]
    return {number: (folder / "trials" / str(number) / "summary.json").stat().st_mtime for number in numbers}


def wait_for(folder: Path, count: int, *drivers: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while len(finished(folder)) < count:
        if time.monotonic() > until or all(driver.poll() is not None for driver in drivers):
            raise SystemExit(f"{count} trials have not come to their end in {folder}")
        time.sleep(0.5)


def wait_for_checkpoint(folder: Path, log: Path) -> None:
    """Until the trial that a driver runs has saved: what is killed then has something to lose."""
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        said = re.findall(r"^sweep: trial (\d+) (starts|finished)", log.read_text(encoding="utf-8"), re.MULTILINE)
        if (
            said
            and said[-1][1] == "starts"
            and any(folder.glob(f"trials/{said[-1][0]}/checkpoints/step-*/MANIFEST.json"))
        ):
            return
        time.sleep(0.2)
    raise SystemExit(f"no trial of {log} has saved")


def kill(driver: subprocess.Popen[bytes]) -> int:
    """Ends a driver at once, in the middle of a trial; the number of processes it leaves behind."""
    left = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    return len(left)


def killed_and_resumed(folder: Path, log: Path) -> dict[str, Any]:
    """The TPE sweep by three drivers, two of which are killed."""
    first = start(folder, "optuna", 1, log.with_name("tpe-1.log"))
    second = start(folder, "optuna", 1, log.with_name("tpe-2.log"))
    wait_for(folder, 3, first, second)
    wait_for_checkpoint(folder, log.with_name("tpe-1.log"))
    orphans = kill(first)
    wait_for(folder, 6, second)
    wait_for_checkpoint(folder, log.with_name("tpe-2.log"))
    orphans += kill(second)
    before = finished(folder)
    third = start(folder, "optuna", 2, log.with_name("tpe-3.log"))
    code = third.wait(WAIT_SECONDS)
    after = finished(folder)
    started = log.with_name("tpe-3.log").read_text(encoding="utf-8")
    all_logs = "".join(log.with_name(f"tpe-{number}.log").read_text(encoding="utf-8") for number in (1, 2, 3))
    points = [tuple(sorted(trial["params"].items())) for trial in trials(folder)]
    return {
        "exit_code": code,
        "processes_orphaned": orphans,
        "finished_before_the_last_kill": len(before),
        "run_again": [n for n, when in before.items() if after.get(n) != when or f"trial {n} starts" in started],
        "taken_up_again": re.findall(r"trial \d+ starts again, from step \d+", all_logs),
        "points_twice": len(points) - len(set(points)),
        "trials": len(points),
    }


def values(folder: Path) -> list[float]:
    return [trial["values"][0] for trial in trials(folder) if trial["values"]]


def measure(folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    survival = killed_and_resumed(folder / "tpe", folder / "log")
    random = start(folder / "random", "random", 2, folder / "random.log")
    random_code = random.wait(2 * WAIT_SECONDS)
    tpe_values, random_values = values(folder / "tpe"), values(folder / "random")
    return {
        "what": "eval/loss of the tiny model, 10 steps, on a CPU; lower is better",
        "command": "python bench/sweep_search.py",
        "settings": " ".join([*SETTINGS, *SPACE]),
        "tpe": {"values": tpe_values, "best": min(tpe_values), "median": statistics.median(tpe_values)},
        "random": {
            "values": random_values,
            "best": min(random_values),
            "median": statistics.median(random_values),
            "exit_code": random_code,
        },
        "tpe_after_startup_median": statistics.median(tpe_values[4:]),
        "survival": survival,
        "seconds": round(time.monotonic() - began, 1),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "optuna", "hydra-core")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="sweep-search-"))
    print(f"in {folder}")
    found = measure(folder)
    survival = found["survival"]
    checks = {
        "the best of TPE is below the median of random": found["tpe"]["best"] < found["random"]["median"],
        "TPE after its random start is below it too": found["tpe_after_startup_median"] < found["random"]["median"],
        "all trials are there, no point twice": survival["trials"] == TRIALS and not survival["points_twice"],
        "no finished trial ran again": not survival["run_again"],
        "both killed trials went on from their checkpoints": len(survival["taken_up_again"]) >= 2,
    }
    RESULT.write_text(json.dumps(found | {"checks": checks}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found | {"checks": checks}, indent=2))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
