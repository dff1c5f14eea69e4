"""A rank dies or stands still: the others end soon, and one line says which rank, where, and how.

The ranks' parent does nothing when one ends, as under a plain srun: what ends the others is Tunesmith's own doing.
"""

import re
import time
from pathlib import Path

import pytest

ALL_GONE_SECONDS = 10
TIMEOUT_SECONDS = 5  # of a phase, in the tests of hangs
FOUND_SECONDS = TIMEOUT_SECONDS + 5
TIMEOUTS = tuple(f"cluster.{name}_minutes={TIMEOUT_SECONDS / 60}" for name in ("timeout", "save_timeout"))
CAUSE = re.compile(r"^rank (?P<rank>\d+) of \d+.*? at step (?P<step>\d+), in (?P<phase>[^,:;\n]+)", re.MULTILINE)

later = pytest.mark.torture
long = (pytest.mark.slow, pytest.mark.torture)


def the_cause(said: str) -> tuple[int, int, str]:
    """Rank, step and phase of the one line that says what happened."""
    found = list(CAUSE.finditer(said))
    assert len(found) == 1, f"{len(found)} causes in:\n{said[-4000:]}"
    return int(found[0]["rank"]), int(found[0]["step"]), found[0]["phase"].strip()


@pytest.mark.row(1)
@pytest.mark.parametrize(
    ("rank", "step", "phase"),
    [
        pytest.param(1, 4, "backward", marks=long),
        pytest.param(0, 4, "backward", marks=later),
        pytest.param(1, 5, "forward", marks=later),
        pytest.param(0, 2, "update", marks=later),
        pytest.param(1, 7, "reading data", marks=later),
        pytest.param(1, 3, "saving", marks=later),
    ],
)
def test_a_killed_rank_ends_the_job_and_the_run_goes_on_bitwise(
    start, left_alone, trained, losses, published, happened, tmp_path: Path, rank: int, step: int, phase: str
) -> None:
    job = start(faults=f"kill:rank={rank},step={step},phase={phase}").wait()
    assert job.codes[rank] == -9
    assert job.codes[1 - rank] not in (0, 75)
    assert job.seconds_between_ends <= ALL_GONE_SECONDS
    assert the_cause(job.said) == (rank, step, phase)
    assert "SIGKILL" in job.said
    assert "will be hurt on purpose" in job.said
    assert "Traceback" not in job.said
    lost = step - max(published(tmp_path / "run"), default=0)
    assert 0 <= lost <= 3
    again = start().wait()
    assert again.codes == {0: 0, 1: 0}, again.said[-3000:]
    assert "on purpose" not in again.said
    assert losses(tmp_path / "run") == losses(left_alone())
    assert trained(tmp_path / "run") == trained(left_alone())
    happened(f"killed in {phase}: gone {job.seconds_between_ends:.1f} s later, {lost} steps lost")


@pytest.mark.row(2)
@pytest.mark.parametrize(("rank", "phase"), [(1, "forward"), pytest.param(0, "update", marks=later)])
def test_an_exception_ends_the_job_with_its_traceback_first(start, happened, rank: int, phase: str) -> None:
    job = start(faults=f"raise:rank={rank},step=4,phase={phase}").wait()
    assert 0 not in job.codes.values()
    assert job.seconds_between_ends <= ALL_GONE_SECONDS
    assert the_cause(job.said) == (rank, 4, phase)
    assert job.said.count("Traceback (most recent call last)") == 1
    assert job.said.index("Traceback") < CAUSE.search(job.said).start()
    assert "RuntimeError: planned fault" in job.said
    happened(f"raised in {phase}: gone {job.seconds_between_ends:.1f} s later, one traceback, one cause line")


@pytest.mark.row(3)
@pytest.mark.torture
def test_a_rank_that_exits_early_fails_the_job(start, happened) -> None:
    job = start(faults="exit:rank=1,step=4,phase=forward").wait()
    assert job.codes[1] == 0
    assert job.codes[0] != 0
    assert job.seconds_between_ends <= ALL_GONE_SECONDS
    assert the_cause(job.said) == (1, 4, "forward")
    assert "exited with code 0" in job.said
    happened(f"gone {job.seconds_between_ends:.1f} s later")


@pytest.mark.row(4)
@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        pytest.param("stop", 1, marks=long),
        pytest.param("sleep", 1, marks=later),
        pytest.param("sleep", 0, marks=later),
        pytest.param("gil", 1, marks=later),
        pytest.param("stop", 0, marks=later),
    ],
)
def test_a_hanging_rank_is_found_and_named(start, happened, tmp_path: Path, kind: str, rank: int) -> None:
    job = start(*TIMEOUTS, faults=f"{kind}:rank={rank},step=4,phase=forward")
    seconds = ended_after(job, tmp_path / "run", 4)
    assert seconds <= FOUND_SECONDS
    assert 0 not in job.codes.values()
    assert the_cause(job.said) == (rank, 4, "forward")
    for other in {0, 1} - ({rank} if kind == "stop" else set()):  # a stopped process dumps nothing
        stack = (tmp_path / f"run/stacks/rank-{other}.txt").read_text()
        assert "optimizer_step" in stack
    happened(f"{kind}, rank {rank}: all gone {seconds:.1f} s after its last step, timeout {TIMEOUT_SECONDS} s")


@pytest.mark.row(5)
@pytest.mark.parametrize(
    ("phase", "overrides"),
    [
        pytest.param("saving", (), marks=later),
        pytest.param("evaluating", ("data.validation_fraction=0.2", "evaluate.every_steps=3"), marks=later),
    ],
)
def test_a_hang_in_a_save_or_an_evaluation_leaves_the_last_checkpoint(
    start, published, happened, tmp_path: Path, phase: str, overrides: tuple[str, ...]
) -> None:
    job = start(*TIMEOUTS, *overrides, faults=f"sleep:rank=1,step=6,phase={phase}")
    seconds = ended_after(job, tmp_path / "run", 6)
    assert seconds <= FOUND_SECONDS
    assert the_cause(job.said) == (1, 6, phase)
    assert published(tmp_path / "run") == [3]
    again = start(*overrides).wait()
    assert again.codes == {0: 0, 1: 0}, again.said[-3000:]
    happened(f"{phase}: all gone {seconds:.1f} s after the last step, step 3 loads")


def ended_after(job, run_dir: Path, step: int) -> float:
    """Seconds from a step's row in metrics.jsonl to the last rank's end."""
    metrics = run_dir / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and f'"step":{step},' in metrics.read_text())
    reached = time.monotonic()
    job.wait(60)
    return max(forked.ended_at for forked in job.ranks) - reached
