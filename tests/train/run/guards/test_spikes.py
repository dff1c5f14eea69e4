"""What is a loss spike and what is noise."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.train.run.guards.spikes import FEWEST, WINDOW, find_spike, remember

NOISE = Path(__file__).parent / "loss_noise.json"
SIGMA = 6.0


def alarms(losses: list[float], sigma: float = SIGMA) -> list[int]:
    """Indices of the losses that are spikes after those before them."""
    before: list[float] = []
    found = []
    for index, loss in enumerate(losses):
        if find_spike(loss, before, sigma):
            found.append(index)
        remember(before, loss)
    return found


def falling(num_steps: int, noise: list[float], lots: random.Random) -> list[float]:
    """A curve that falls from 4 to 1 nats and goes on flat."""
    return [(1.0 + 3.0 * 0.99 ** (step / 2)) * (1 + lots.choice(noise)) for step in range(num_steps)]


@pytest.fixture(scope="module")
def noise_of() -> Callable[[str, str], list[float]]:
    """What three runs of the tiny model on conf/data/example/chat_train.jsonl had, at batches of 1, 2 and 8.

    learning: how far each loss above 0.25 nats was from the mean of the 33 around it, as a share of it. known: the
    losses after that, when the model knew its data by heart, but for the one record in fifty that it did not.
    """
    recorded = json.loads(NOISE.read_text(encoding="utf-8"))
    return lambda batch, kind: recorded[f"batch of {batch}"][kind]


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("kind", ["learning", "known"])
def test_the_noise_of_real_runs_alarms_at_most_once_in_a_thousand_steps(
    noise_of: Callable[..., list[float]], batch: int, kind: str
) -> None:
    noise, lots = noise_of(batch, kind), random.Random(0)
    if kind == "learning":
        curves = [falling(1000, noise, lots) for _ in range(20)]
    else:
        curves = [lots.choices(noise, k=1000) for _ in range(20)]
    assert sum(len(alarms(losses)) for losses in curves) <= 20


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("at", [300, 900])
def test_a_loss_five_times_as_high_is_a_spike_in_the_noise_of_real_runs(
    noise_of: Callable[..., list[float]], batch: int, at: int
) -> None:
    noise, lots = noise_of(batch, "learning"), random.Random(1)
    found = 0
    for _ in range(50):
        losses = falling(at, noise, lots)
        found += find_spike(5 * losses[-1], losses[:-1], SIGMA) is not None
    assert found >= 40


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0 + 0.01 * (-1) ** step for step in range(100)] + [2.5], [100]),
        ([0.001 + 1e-6 * (-1) ** step for step in range(200)] + [0.01, 0.05], []),  # flat: no alarm at a ripple
        ([0.001] * 200 + [0.5], [200]),  # a whole nat would be seen
        ([2.0] * (FEWEST - 1) + [9.0], []),  # too few before it
        ([2.0] * FEWEST + [9.0], [FEWEST]),
        ([2.0] * 50 + [float("nan"), float("inf"), 2.0], []),  # not finite: counted elsewhere
        ([2.0 - 0.01 * step for step in range(150)], []),
        ([9.0] * 40 + [2.0] * (WINDOW + 1) + [3.0], [40 + WINDOW + 1]),  # the start has left the window
    ],
)
def test_what_is_a_spike(losses: list[float], expected: list[int]) -> None:
    assert alarms(losses) == expected


def test_a_new_level_is_a_spike_for_a_few_steps_only() -> None:
    lots = random.Random(2)
    losses = [lots.gauss(2.0, 0.05) for _ in range(200)] + [lots.gauss(4.0, 0.05) for _ in range(200)]
    found = alarms(losses)
    assert found
    assert found == list(range(200, 200 + len(found)))
    assert len(found) <= 4


def test_the_window_holds_128_losses_and_says_what_it_saw() -> None:
    losses: list[float] = []
    for step in range(200):
        remember(losses, float(step % 2))
    remember(losses, float("nan"))
    assert len(losses) == WINDOW
    assert str(find_spike(10.0, losses, SIGMA)) == (
        "loss 10 is 19 standard deviations above the mean 0.5 of the 128 losses before"
    )
