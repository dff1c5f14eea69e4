"""Loss spikes: a loss far above what the losses before it, and their noise, let one expect.

    spike: loss > mean + sigma x standard deviation of the last 128 losses, and loss > mean + 0.1 nats + 2 % of mean

The first rule and its figures are OLMo-core's (6 sigma, 128 steps). The second keeps a curve that has become flat, a
model that knows its data by heart, from alarming at every ripple. A spike goes into the window like any loss: what
stays high is a new level after a few steps, not a spike for ever.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 128  # losses looked back on
FEWEST = 32  # losses before anything is called a spike
LEAST_RISE = 0.1  # nats
LEAST_SHARE = 0.02  # of the mean
NUM_PASSED_OVER = 3  # the step with the spike and the two before it: the update that broke it came before the loss did


@dataclass(frozen=True)
class Spike:
    """A loss, and what it was measured against."""

    loss: float
    mean: float
    deviations: float  # how many standard deviations the loss is above the mean; inf where there was no noise
    num_losses: int

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4g} is {self.deviations:.3g} standard deviations above the mean {self.mean:.4g} of the "
            f"{self.num_losses} losses before"
        )


def find_spike(loss: float, before: Sequence[float], sigma: float) -> Spike | None:
    """The spike that a loss is after the losses before it (the newest last), if it is one. A pure function."""
    window = before[-WINDOW:]
    if len(window) < FEWEST or not math.isfinite(loss):
        return None
    mean = math.fsum(window) / len(window)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in window) / len(window))
    rise = loss - mean
    if rise <= sigma * deviation or rise <= LEAST_RISE + LEAST_SHARE * abs(mean):
        return None
    return Spike(loss, mean, rise / deviation if deviation else math.inf, len(window))


def remember(losses: list[float], loss: float) -> None:
    """Appends a loss to the window, if it is finite, and drops what the window no longer holds."""
    if math.isfinite(loss):
        losses.append(loss)
        del losses[:-WINDOW]
