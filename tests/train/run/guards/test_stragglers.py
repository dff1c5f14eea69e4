"""A slow rank is named soon and once; noise is not."""

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tunesmith.train.run.guards.stragglers import Stragglers, median_of_others

HOSTS = ["a", "a", "b", "b"]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7, 8])
def test_the_median_of_the_others_is_that_without_oneself(num_ranks: int) -> None:
    lots = np.random.default_rng(num_ranks)
    for values in (lots.random(num_ranks), lots.integers(0, 3, num_ranks).astype(float)):
        expected = [statistics.median(np.delete(values, rank)) for rank in range(num_ranks)]
        assert median_of_others(values).tolist() == pytest.approx(expected)


def watched(times: np.ndarray, step_seconds: float) -> list[tuple[int, str]]:
    """(step counted from 1, sentence) of each rank named over [steps, ranks] of busy seconds."""
    stragglers = Stragglers(HOSTS[: times.shape[1]])
    return [
        (step, said)
        for step, busy in enumerate(times, 1)
        for said in stragglers.add(tuple(busy.tolist()), step_seconds)
    ]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("first_slow", [0, 50])
def test_a_rank_that_sleeps_is_named_within_20_steps_and_once(num_ranks: int, first_slow: int) -> None:
    lots = np.random.default_rng(0)
    times = 0.1 * lots.lognormal(0, 0.3, (300, num_ranks))
    times[first_slow:, 1] += 0.3
    ((step, said),) = watched(times, step_seconds=0.6)
    assert step <= first_slow + 19  # what a rank says of a step is heard at the next
    own, others = map(float, re.findall(r"([0-9.]+) s o[fn]", said))
    assert said.startswith("rank 1 (a) is slow: ")
    assert own - others == pytest.approx(0.3, abs=0.05)


def test_a_rank_that_was_well_in_between_is_named_again() -> None:
    times = np.full((200, 4), 0.1)
    times[20:60, 2] = times[120:160, 2] = 0.4
    assert [step for step, _ in watched(times, 0.6)] == [35, 135]


@pytest.mark.parametrize(("busy", "step_seconds"), [((0.010, 0.015), 0.1), ((0.1, 0.14), 0.3), ((0.1, 0.16), 2.0)])
def test_a_small_delay_is_not_worth_a_word(busy: tuple[float, ...], step_seconds: float) -> None:
    assert watched(np.tile(busy, (100, 1)), step_seconds) == []


@pytest.mark.row(23)
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("kind", ["log-normal", "rare stalls", "records of uneven length"])
def test_noise_is_named_at_most_once_in_a_thousand_steps(num_ranks: int, kind: str) -> None:
    lots = np.random.default_rng(1)
    shape = (6_000, num_ranks)
    if kind == "log-normal":
        times = 0.1 * lots.lognormal(0, 0.5, shape)
    elif kind == "rare stalls":  # one step in ten is held up, for as much as seconds
        times = 0.1 + 0.02 * lots.random(shape) + (lots.random(shape) < 0.1) * lots.pareto(1.5, shape)
    else:
        times = 0.02 + 0.2 * lots.random(shape)
    assert len(watched(times, step_seconds=0.25)) <= 6


def slept(rank: Any, overrides: list[str], faults: str) -> dict[str, Any]:
    """On every rank: a run in which one rank sleeps, what it was told, and the busy seconds of each rank and step."""
    with rank.ready(overrides) as (loop, recorder):
        started = time.monotonic()
        with rank.faults(loop, faults):
            loop.train()
    busy = [step.consensus.busy_seconds for step in recorder.steps]
    return {"warnings": recorder.warnings, "busy": busy, "seconds": time.monotonic() - started}


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]]) -> Any:
    own = ["batch.global_batch_size=4", "checkpoint.at_end=false"]
    return lambda stage, num_steps: short_run(stage, num_steps, *own)


@pytest.mark.torture
@pytest.mark.slow  # it measures seconds: another program on the machine can hide the slow rank
@pytest.mark.row(23)
@pytest.mark.parametrize(("stage", "phase"), [(2, "forward"), (3, "reading data")])
def test_a_rank_that_sleeps_in_a_real_run_is_named_within_20_steps(
    ranks: Callable[[int], Any], overrides_of: Any, happened: Callable[[str], None], stage: int, phase: str
) -> None:
    faults = f"slow:rank=1,step=0,last_step=99,phase={phase},seconds=0.3"
    found = ranks(2).run(slept, overrides=overrides_of(stage, 20), faults=faults)[0]
    (warning,) = found["warnings"]
    assert "rank 1 (" in warning
    assert 16 <= int(warning.removeprefix("step ").split(":")[0]) <= 20
    happened(f"ZeRO {stage}, 0.3 s more in {phase}: named at {warning.partition(':')[0]}")
    assert found["busy"][0] == [0.0, 0.0]
    assert all(slow > 0.3 > 3 * fast for fast, slow in found["busy"][2:])  # the wait for rank 1 is no work of rank 0


@pytest.mark.slow
def test_a_run_that_is_well_names_nobody(ranks: Callable[[int], Any], overrides_of: Any) -> None:
    found = ranks(2).run(slept, overrides=overrides_of(1, 60), faults="")[0]
    assert found["warnings"] == []
