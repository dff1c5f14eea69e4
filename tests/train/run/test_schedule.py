import math

import pytest

from tunesmith.train.config.config import ScheduleConfig, ScheduleKind
from tunesmith.train.run.schedule import learning_rate_factor

TOTAL = 40


def factors(kind: ScheduleKind, total_steps: int = TOTAL, **settings: float) -> list[float]:
    schedule = ScheduleConfig(kind=kind, max_steps=total_steps, **settings)
    return [learning_rate_factor(schedule, total_steps)(step) for step in range(total_steps)]


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_warm_up_reaches_the_top_at_its_last_step(kind: ScheduleKind) -> None:
    found = factors(kind, warmup_fraction=0.1)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(found) == 1.0


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_without_warm_up_the_first_step_is_at_the_top(kind: ScheduleKind) -> None:
    assert factors(kind)[0] == 1.0


def test_constant_stays() -> None:
    assert factors(ScheduleKind.constant, warmup_fraction=0.1)[3:] == [1.0] * (TOTAL - 3)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear_is_a_line_to_the_final_fraction_one_step_after_the_run(final: float) -> None:
    found = factors(ScheduleKind.linear, warmup_fraction=0.1, final_fraction=final)
    expected = [1 - (1 - final) * k / 36 for k in range(36)]
    assert found[4:] == pytest.approx(expected, abs=1e-15)
    assert found[-1] > final  # no step is spent on a learning rate of 0


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_half_a_wave_to_the_final_fraction(final: float) -> None:
    found = factors(ScheduleKind.cosine, warmup_fraction=0.1, final_fraction=final)
    expected = [final + (1 - final) * 0.5 * (1 + math.cos(math.pi * k / 36)) for k in range(36)]
    assert found[4:] == pytest.approx(expected, abs=1e-15)
    assert found[4 + 18] == pytest.approx((1 + final) / 2)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_wsd_is_stable_and_then_falls_in_a_line(final: float) -> None:
    found = factors(ScheduleKind.wsd, warmup_fraction=0.1, decay_fraction=0.25, final_fraction=final)
    assert found[3:31] == [1.0] * 28
    assert found[30:] == pytest.approx([1 - (1 - final) * k / 10 for k in range(10)], abs=1e-15)


@pytest.mark.parametrize("kind", list(ScheduleKind))
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs_never_leave_zero_to_one(kind: ScheduleKind, total: int) -> None:
    found = factors(kind, total, warmup_fraction=0.5)
    assert all(0 < factor <= 1 for factor in found)
