"""Trials as jobs of a SLURM that does not always answer: small programs stand for sbatch, squeue and scancel.

tests/cluster/test_sweep_slurm.py has a real one, which cannot be sent away at will.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tunesmith.launch.cluster.queue import COLUMNS, ID_WIDTH
from tunesmith.launch.sweeping import slurm_slots
from tunesmith.launch.sweeping.driver import SweepDriver
from tunesmith.launch.sweeping.plan import SweepPlan
from tunesmith.launch.sweeping.slots import NotNow
from tunesmith.launch.sweeping.slurm_slots import SlurmSlots
from tunesmith.launch.sweeping.trials import Trials
from tunesmith.train.errors import ConfigError

SEARCH = ["optimizer.learning_rate=1e-4,1e-3", "cluster=slurm", "cluster.gpus_per_node=null"]
UNREACHABLE = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
FULL = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: "
    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
# The file `says` is what each program fails with; `job-<id>` holds a state. Where `done` lies, jobs end as they start.
HEAD = '#!/bin/sh\ncd "$(dirname "$0")"\n[ -f says ] && { cat says >&2; exit 1; }\n'
SBATCH = """
[ "$1" = --test-only ] && exit 0
id=$((41 + $(ls | grep -c job-)))
echo PENDING > job-$id
echo "$2" > script-$id
if [ -f done ]; then
    run=$(dirname "$(dirname "$2")")
    mkdir "$run/model"
    echo '{"status": "finished", "eval": {"loss": 0.5}}' > "$run/summary.json"
    echo COMPLETED > job-$id
fi
echo $id
"""
SQUEUE = f"""
for given in "$@"; do case "$given" in --jobs=*) id=${{given#--jobs=}} ;; esac; done
if [ "$1" = --me ]; then
    for job in job-*; do
        [ -f "$job" ] && printf '%-{ID_WIDTH}s%s\\n' "${{job#job-}}" "$(cat "script-${{job#job-}}")"
    done
    exit 0
fi
[ -f "job-$id" ] || {{ echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }}
printf '{"".join(f"%-{width}s" for width in COLUMNS.values())}\\n' "$(cat "job-$id")"
"""
SCANCEL = 'for id in "$@"; do :; done\necho CANCELLED > "job-$id"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the programs and their files."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
        (folder / name).write_text(HEAD + text)
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    for name in ("QUEUE_SECONDS", "SUBMIT_AGAIN_SECONDS"):
        monkeypatch.setattr(slurm_slots, name, 0.3)
    return folder


Jobs = Callable[[SweepPlan], SweepDriver]
Plans = Callable[..., SweepPlan]
Studies = Callable[[SweepPlan], Trials]


@pytest.fixture
def jobs_of(trials_of: Studies) -> Jobs:
    """jobs_of(plan) is a driver of its own whose trials are jobs."""
    return lambda plan: SweepDriver(plan, trials_of(plan), SlurmSlots(plan))


def after(seconds: float, action: Callable[[], Any]) -> None:
    threading.Timer(seconds, action).start()


def once(condition: Callable[[], bool], action: Callable[[], Any]) -> None:
    """The action as soon as the condition is true."""

    def wait() -> None:
        while not condition():
            time.sleep(0.05)
        action()

    threading.Thread(target=wait, daemon=True).start()


def ids(slurm: Path) -> list[str]:
    return sorted(path.name for path in slurm.glob("job-*"))


@pytest.mark.parametrize("says", [UNREACHABLE, FULL])
def test_trials_wait_for_a_slurm_that_takes_no_jobs_just_then(
    plan_of: Plans, jobs_of: Jobs, slurm: Path, report_of: Any, capsys: Any, says: str
) -> None:
    plan = plan_of(SEARCH, n_jobs=2)
    (slurm / "says").write_text(says)
    (slurm / "done").touch()
    after(1.5, (slurm / "says").unlink)
    jobs_of(plan).run()
    assert [trial["status"] for trial in report_of(plan)["trials"]] == ["finished", "finished"]
    assert ids(slurm) == ["job-41", "job-42"]
    said = [line for line in capsys.readouterr().out.splitlines() if " waits, and is tried again " in line]
    assert len(said) == 1, said
    assert said[0].startswith("sweep: trial 0 waits, and is tried again every 0.3 s: SLURM ")


def test_what_slurm_refuses_for_good_is_a_failed_trial(
    plan_of: Plans, jobs_of: Jobs, slurm: Path, report_of: Any
) -> None:
    plan = plan_of(SEARCH)
    (slurm / "says").write_text("sbatch: error: Batch job submission failed: Invalid partition name specified")
    jobs_of(plan).run()
    causes = [trial["cause"] for trial in report_of(plan)["trials"]]
    assert len(causes) == 2
    assert all("Invalid partition name specified" in cause for cause in causes)


def test_a_job_is_found_again_once_the_queue_answers(plan_of: Plans, slurm: Path) -> None:
    plan = plan_of(SEARCH)
    overrides = plan.overrides(0, {"optimizer.learning_rate": "1e-4"})
    assert SlurmSlots(plan).start(0, overrides, None).job_id == "41"
    (slurm / "says").write_text("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for known in ("41", None):  # None: its driver was killed before it had noted the job down
        with pytest.raises(NotNow, match="SLURM does not answer"):
            SlurmSlots(plan).start(0, overrides, known)
    (slurm / "says").unlink()
    for known in ("41", None):
        assert SlurmSlots(plan).start(0, overrides, known).job_id == "41"
    (slurm / "job-41").write_text("COMPLETED")
    assert SlurmSlots(plan).start(0, overrides, "41").job_id == "42"
    with pytest.raises(ConfigError):
        SlurmSlots(plan).start(1, [*overrides, "optimizer.learning_rate=-1"], None)


def test_jobs_that_wait_in_the_queue_are_stopped_though_slurm_is_silent_at_first_and_gone_on_with(
    plan_of: Plans, jobs_of: Jobs, slurm: Path, report_of: Any
) -> None:
    plan = plan_of(SEARCH, n_jobs=2)
    driver = jobs_of(plan)

    def interrupt() -> None:
        (slurm / "says").write_text("Unable to contact slurm controller (connect failure)")
        os.kill(os.getpid(), signal.SIGTERM)
        after(1.0, (slurm / "says").unlink)

    once(lambda: ids(slurm) == ["job-41", "job-42"], interrupt)
    driver.run()
    assert driver.asked == "SIGTERM"
    assert [path.read_text().strip() for path in sorted(slurm.glob("job-*"))] == ["CANCELLED"] * 2
    assert [trial["status"] for trial in report_of(plan)["trials"]] == ["stopped", "stopped"]
    driver.trials.close()
    (slurm / "done").touch()
    jobs_of(plan).run()
    assert [trial["status"] for trial in report_of(plan)["trials"]] == ["finished", "finished"]
    assert len(ids(slurm)) == 4


def test_a_job_whose_driver_was_killed_before_it_noted_it_down_is_followed_not_started_twice(
    plan_of: Plans, jobs_of: Jobs, trials_of: Studies, slurm: Path, report_of: Any
) -> None:
    plan = plan_of(SEARCH, n_trials=1)
    killed = trials_of(plan)
    trial = killed.claim_next(may_begin=True)
    assert trial is not None
    SlurmSlots(plan).start(0, plan.overrides(0, trial.params), None)
    killed.close()
    folder = plan.trial_folder(0)

    def finish() -> None:
        (folder / "model").mkdir()
        (folder / "summary.json").write_text('{"status": "finished", "eval": {"loss": 0.5}}')
        (slurm / "job-41").write_text("COMPLETED")

    after(1.5, finish)
    with FileLock(folder / ".tunesmith-lock"):  # the training has it for as long as it runs
        jobs_of(plan).run()
    assert [trial["status"] for trial in report_of(plan)["trials"]] == ["finished"]
    assert ids(slurm) == ["job-41"]
