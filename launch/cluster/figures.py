"""Figures as files and SLURM give them: None in place of one that cannot be meant."""

import math

LARGEST = 1e15  # more than any run has of anything
LAST_MOMENT = 1e11  # unix seconds; the year 5138


def figure(value: object) -> int | float | None:
    """A number that is finite and no larger than LARGEST."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if abs(value) <= LARGEST else None


def count(value: object) -> int | None:
    """A whole number of 0 or more."""
    known = figure(value)
    return known if isinstance(known, int) and known >= 0 else None


def seconds(value: object) -> float | None:
    """A time above 0."""
    known = figure(value)
    return known if known is not None and known > 0 else None


def moment(value: object) -> float | None:
    """Unix seconds of a date that can be written."""
    known = seconds(value)
    return known if known is not None and known <= LAST_MOMENT else None
