"""One run, crashed again and again, ends with bitwise the weights of one that was left alone."""

import random
from pathlib import Path

import pytest

EVERY_STEPS = 3
PHASES = ("reading data", "meeting at a step", "forward", "backward", "update", "saving")


def crash_after(step: int, lots: random.Random) -> str:
    """A killed rank about three steps after one; a save happens with a multiple of EVERY_STEPS done."""
    phase = lots.choice(PHASES)
    at = step + (EVERY_STEPS if phase == "saving" else lots.randint(1, 5))
    return f"kill:rank={lots.randint(0, 1)},step={at},phase={phase}"


@pytest.mark.row(16)
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "num_crashes",
    [pytest.param(3, marks=(pytest.mark.slow, pytest.mark.torture)), pytest.param(20, marks=pytest.mark.torture)],
)
def test_seeded_crashes_change_nothing_and_cost_at_most_an_interval_each(
    start, left_alone, trained, losses, published, happened, tmp_path: Path, num_crashes: int
) -> None:
    lots, longer, run_dir = random.Random(7), f"schedule.max_steps={18 if num_crashes < 20 else 90}", tmp_path / "run"
    alone = left_alone(longer)
    lost = []
    for _ in range(num_crashes):
        fault = crash_after(max(published(run_dir), default=0), lots)
        job = start(longer, faults=fault).wait()
        assert any(job.codes.values()), f"{fault} did not strike:\n{job.said[-2000:]}"
        lost.append(max(losses(run_dir), default=0) - max(published(run_dir), default=0))
    job = start(longer).wait()
    assert job.codes == {0: 0, 1: 0}, job.said[-3000:]
    assert losses(run_dir) == losses(alone)
    assert trained(run_dir) == trained(alone)
    assert max(lost) <= EVERY_STEPS
    happened(
        f"{num_crashes} crashes: weights bitwise equal, {sum(lost)} steps lost, {num_crashes * EVERY_STEPS} allowed"
    )


@pytest.mark.row(6)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("rank", "every", "save"),
    [
        pytest.param(0, 1, "sync", marks=pytest.mark.torture),
        pytest.param(1, 1, "sync", marks=pytest.mark.torture),
        pytest.param(0, 4, "async", marks=pytest.mark.torture),
        pytest.param(1, 4, "async", marks=pytest.mark.torture),
    ],
)
def test_killed_at_each_file_operation_of_a_save_the_newest_valid_step_goes_on(
    start, left_alone, trained, losses, published, happened, tmp_path: Path, rank: int, every: int, save: str
) -> None:
    """One run: each attempt goes on from what the last crash left and is killed one operation later, until a save has
    no operation of that number; then it runs to its end.
    """
    run_dir, settings = tmp_path / "run", ["schedule.max_steps=150"]
    alone = left_alone(*settings)
    settings += ["checkpoint.async_save=true"] if save == "async" else []
    operation, num_new = 1, 0
    while True:
        before = max(published(run_dir), default=0)
        job = start(*settings, faults=f"kill_at_file:rank={rank},save=1,operation={operation}").wait()
        if not any(job.codes.values()):
            break
        assert job.codes[rank] == -9, f"operation {operation}:\n{job.said[-2000:]}"
        assert before == 0 or f"step {before}" in job.said, f"operation {operation}:\n{job.said[-2000:]}"
        assert not list((run_dir / "checkpoints").glob("*bad*"))
        num_new += max(published(run_dir), default=0) > before
        operation += every
    assert job.codes == {0: 0, 1: 0}, job.said[-3000:]
    assert operation > (20 if rank == 0 else 10)
    assert (num_new > 0) == (rank == 0)  # rank 1 has written all of its part before the commit
    assert losses(run_dir) == losses(alone)
    assert trained(run_dir) == trained(alone)
    happened(
        f"{save} save, rank {rank}: killed at {operation // every} operations, {num_new} times after the commit, "
        f"{operation // every - num_new} before; losses and weights bitwise each time"
    )
