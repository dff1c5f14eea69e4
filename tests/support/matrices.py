"""Matrices of which `make test` has a few points that cover each setting and most pairs, and `make test-slow` all."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def covered(points: Iterable[Any], quick: Sequence[Any], torture: Sequence[Any] = ()) -> list[Any]:
    """The points as parameters of a test: those that are not quick are slow, and some of them also in `make torture`.

    ValueError when a quick one is not among the points.
    """
    every = list(points)
    if strangers := [point for point in (*quick, *torture) if point not in every]:
        raise ValueError(f"not in the matrix: {strangers}")

    def marks(point: Any) -> list[pytest.MarkDecorator]:
        rest = [pytest.mark.slow, *([pytest.mark.torture] if point in torture else [])]
        return [] if point in quick else rest

    return [pytest.param(*(point if isinstance(point, tuple) else (point,)), marks=marks(point)) for point in every]
