"""launch/profile.py: a page and a short list, and nothing else of a training."""

import json
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
SHORT = ("+exp=debug", "batch.sequence_length=256", "data.truncate=drop", "data.preview=0")


def test_some_steps_are_recorded_and_nothing_is_saved(launch, tmp_path):
    done = launch("forked", "profile", *SHORT, "profile.start_step=2", "profile.num_steps=1", "output_dir=run")
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "run"
    assert f"profile of steps 2 to 2: {run_dir}/profile/profile.html" in done.stdout
    assert " ms of the step for the host to start" in done.stdout or "no setting promises 2 %" in done.stdout
    assert {path.name for path in (run_dir / "profile").iterdir()} == {"profile.html", "trace.json.gz"}
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    assert names == {"profile", "config.yaml", "metrics.jsonl", "plan.json", "summary.json"}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["name"], summary["steps"]) == ("profiled", "debug-profile", 2)


def test_nsys_without_a_gpu_is_refused_before_anything_is_read(launch, tmp_path):
    done = launch("forked", "train", *SHORT, "profile=nsys", "output_dir=run")
    assert done.returncode == 2
    assert "this run is on a CPU" in done.stderr
    assert "profile.nvtx (conf/profile/nsys.yaml:4)" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_choice_without_a_page_is_refused(launch):
    done = launch("forked", "profile", *SHORT, "profile=sampled")
    assert done.returncode == 2
    assert "no step would be recorded" in done.stderr


def test_the_standard_librarys_profile_is_still_found_beside_the_script():
    """torch imports cProfile, which imports profile; a script of launch/ has this folder first on its path."""
    code = (
        f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import cProfile, profile; print(profile.Profile.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("profile\n", "")
