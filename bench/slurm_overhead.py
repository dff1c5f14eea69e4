"""What a job by launch/slurm.py costs beside `srun python launch/train.py` in a script of one's own, on a real SLURM.

    python bench/slurm_overhead.py --out bench/results/slurm_overhead.json [--repeats 7]

Run it where SLURM_CONF leads to a cluster with two idle nodes. Both ways start a program that writes down when it
began and ends at once, in place of launch/train.py, so that only the start is measured: from the first line of the
job's script to the first line of the first rank. They take turns. Rendering: `launch/slurm.py --dry-run`, as a process.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tunesmith.launch.cluster import sbatch, steps
from tunesmith.launch.cluster.job_spec import JobSpec
from tunesmith.train.config.config import ClusterConfig

ROOT = Path(__file__).parents[1]
RANK = """import os, pathlib, time
pathlib.Path(os.environ["BEGAN"] + os.environ["SLURM_PROCID"]).write_text(repr(time.time()))
"""
# The driver of a job, with a program that only writes down when it began in place of launch/train.py.
DRIVER = """import pathlib, sys
from tunesmith.launch.arguments import main
from tunesmith.launch.cluster import job, steps
steps.TRAIN = pathlib.Path(sys.argv.pop(1))
main(job.job)
"""
BARE = "srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1"


def seconds_to_first_rank(folder: Path, name: str, body: str) -> float:
    """From the first line of a job's script until its first rank runs."""
    home = folder / name
    shutil.rmtree(home, ignore_errors=True)
    (home / "job").mkdir(parents=True)
    script = home / "script.sh"
    head = f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output={home}/job.log\n"
    script.write_text(f"{head}export BEGAN={home}/began-\ndate +%s.%N > {home}/script\n{body}\n")
    subprocess.run(["sbatch", "--wait", "--quiet", str(script)], timeout=120, check=False, stdin=subprocess.DEVNULL)
    began = [float(path.read_text()) for path in home.glob("began-*")]
    assert len(began) == 2, (home / "job.log").read_text()
    return min(began) - float((home / "script").read_text())


def render_seconds() -> float:
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "launch/slurm.py"), "--dry-run", "+exp=debug", "cluster.gpus_per_node=null"]
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"} | {"PATH": "/nowhere"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=60)
    return time.monotonic() - started


def summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    rows: dict[str, list[float]] = {"ours": [], "without_preflight": [], "bare": [], "bare_again": []}
    with tempfile.TemporaryDirectory(prefix="tunesmith-overhead-") as name:
        folder = Path(name)
        rank, driver = folder / "rank.py", folder / "driver.py"
        rank.write_text(RANK)
        driver.write_text(DRIVER)
        for _ in range(given.repeats):
            for key in rows:
                home = folder / key
                spec = JobSpec(run_dir=home, overrides=[], nodes=2, preflight=key == "ours", max_restarts=0)
                ours = sbatch.render(spec, ClusterConfig(), "overhead").partition("\nexec ")[2]
                body = f"{BARE} {sys.executable} {rank}"
                if not key.startswith("bare"):
                    body = f"{sys.executable} -P {driver} {rank} {ours.partition(sbatch.DRIVER)[2]}"
                rows[key].append(seconds_to_first_rank(folder, key, body))
                print(f"{key:18} {rows[key][-1]:.3f} s", flush=True)
        renders = [render_seconds() for _ in range(given.repeats)]
    assert steps.TRAIN.is_file()
    found = {name: summary(values) for name, values in rows.items()}
    found |= {"render": summary(renders), "overhead_median": found["ours"]["median"] - found["bare"]["median"]}
    slurm = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    found |= {"where": {"slurm": slurm, "cores": os.cpu_count(), "python": platform.python_version()}}
    print(json.dumps(found, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
