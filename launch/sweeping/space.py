"""What a sweep searches: some keys with several values or an interval each, in Hydra's own grammar.

adapter.r=8,16,32                                      values
adapter.r=choice(8,16,32)                              the same
batch.global_batch_size=range(8,33,8)                  8, 16, 24, 32
optimizer.learning_rate='tag(log,interval(1e-5,1e-3))' any number between; log: each power of ten is as likely
adapter.r='int(interval(4,64))'                        any whole number between, both ends included
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tunesmith.train.config.compose import group_options, parse_override
from tunesmith.train.config.origins import one_line
from tunesmith.train.errors import ConfigError

GRAMMAR = "write key=a,b or range(start,stop,step), interval(low,high), tag(log,interval(low,high)), int(interval(..))."
MAX_RANGE = 100_000  # numbers of one range, which are listed
Point = dict[str, Any]  # a text or a number for each key of the space, as the study keeps it
Dimension = (
    CategoricalDistribution | FloatDistribution | IntDistribution
)  # values are the texts behind the = of an override


@dataclass(frozen=True)
class Space:
    """The keys that are searched, and the overrides that every trial has."""

    dimensions: dict[str, Dimension]  # key of an override, with its plus if it has one
    fixed: tuple[str, ...]

    def overrides(self, point: Point) -> list[str]:
        """The overrides of one trial."""
        return [*self.fixed, *(f"{key}={point[key]}" for key in self.dimensions)]

    def points(self) -> Iterator[Point]:
        """All points, the last key changing fastest. Only where each dimension can be listed."""
        for values in itertools.product(*(listed(one) or [] for one in self.dimensions.values())):
            yield dict(zip(self.dimensions, values, strict=True))

    @property
    def size(self) -> int | None:
        """Its number of points; None where it has an interval."""
        return None if self.intervals() else math.prod(len(listed(one) or []) for one in self.dimensions.values())

    def intervals(self) -> list[str]:
        """The keys whose values cannot be listed."""
        return [key for key, one in self.dimensions.items() if listed(one) is None]

    def corners(self) -> list[Point]:
        """The first and the last combination."""
        ends = {
            key: (one.choices[0], one.choices[-1]) if isinstance(one, CategoricalDistribution) else (one.low, one.high)
            for key, one in self.dimensions.items()
        }
        return [{key: end[which] for key, end in ends.items()} for which in (0, 1)]

    def described(self) -> dict[str, Any]:
        """As plain values, to be compared with those of another command."""
        return {key: _described(one) for key, one in self.dimensions.items()}


def listed(one: Dimension) -> list[Any] | None:
    """All values; None where they cannot be counted."""
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    if one.log or one.step is None:
        return None
    return [one.low + number * one.step for number in range(round((one.high - one.low) / one.step) + 1)]


def read_space(params: Mapping[str, str], overrides: Sequence[str], folders: list[Path]) -> Space:
    """The space of the params of a yaml file and of a command line, which has the last word for each key.

    Raises ConfigError for what is not understood, and where there is nothing to search.
    """
    given: dict[str, tuple[str, Override]] = {}
    for text in [*(f"{key}={value}" for key, value in params.items()), *overrides]:
        override = parse_override(text, several=True)
        key = override.get_key_element().lstrip("+")
        given.pop(key, None)
        given[key] = (text, override)
    swept = {key: pair for key, pair in given.items() if pair[1].is_sweep_override()}
    if not swept:
        raise ConfigError(
            "there is nothing to search: no key has several values.",
            at="command line",
            do=f"{GRAMMAR[:-1]}, or choose a search space: +sweep=<name>.",
        )
    dimensions = {pair[1].get_key_element(): _dimension(*pair, folders) for pair in swept.values()}
    return Space(dimensions, tuple(text for key, (text, _) in given.items() if key not in swept))


def _dimension(text: str, override: Override, folders: list[Path]) -> Dimension:
    value, at = override.value(), f"command line or hydra.sweeper.params: {one_line(text)}"
    tags = set(getattr(value, "tags", set()))
    if tags - {"log"} or (tags and not isinstance(value, IntervalSweep)):
        raise ConfigError(f"the tags {sorted(tags)} mean nothing here.", at=at, do="tag an interval with log, or none.")
    if getattr(value, "shuffle", False):
        raise ConfigError("shuffle has no effect here.", at=at, do="choose hydra/sweeper=random for a random order.")
    if isinstance(value, IntervalSweep):
        return _interval(value, bool(tags), at)
    if isinstance(value, RangeSweep):
        return _range(value, at)
    texts: list[str] = []
    if isinstance(value, Glob):
        texts = value.filter(group_options(override.key_or_group, folders))
    elif isinstance(value, ChoiceSweep | list):
        texts = list(override.sweep_string_iterator())
    if not texts:
        raise ConfigError(f"{override.key_or_group} has no values to choose from.", at=at, do=GRAMMAR)
    twice = next((one for one in texts if texts.count(one) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} stands there twice.", at=at, do="give each value once.")
    return CategoricalDistribution(texts)


def _interval(value: IntervalSweep, is_log: bool, at: str) -> Dimension:
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    if not low < high or not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"the interval from {low:g} to {high:g} is empty.", at=at, do="give the lower end first.")
    if is_log and low <= 0:
        raise ConfigError(f"an interval from {low:g} has no logarithm.", at=at, do="start above 0, or leave out log.")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(low, high, log=is_log)


def _range(value: RangeSweep, at: str) -> Dimension:
    count = (float(value.stop or 0) - float(value.start or 0)) / float(value.step) if value.step else 0.0
    if count > MAX_RANGE:
        raise ConfigError(
            f"the range has {count:.0f} numbers.", at=at, do="write interval(low,high), or a larger step."
        )
    numbers = list(value.range()) if count > 0 else []
    if not numbers:
        raise ConfigError("the range is empty.", at=at, do="write range(start,stop,step), where stop is left out.")
    low, high, step = min(numbers), max(numbers), abs(value.step)
    if isinstance(low, int) and isinstance(step, int):
        return IntDistribution(low, int(high), step=step)
    # 0.1 + 0.1 + 0.1 is a little more than 0.3
    return FloatDistribution(float(f"{low:.12g}"), float(f"{high:.12g}"), step=float(step))


def _described(one: Dimension) -> Any:
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    kind = ("int " if isinstance(one, IntDistribution) else "") + ("log " if one.log else "")
    return f"{kind}{one.low!r} to {one.high!r}" + (f" by {one.step!r}" if one.step and not one.log else "")
