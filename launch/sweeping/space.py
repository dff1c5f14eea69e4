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
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

from tunesmith.train.config.compose import group_options, parse_override
from tunesmith.train.config.origins import one_line
from tunesmith.train.errors import ConfigError

GRAMMAR = "write key=a,b or range(start,stop,step), interval(low,high), tag(log,interval(low,high)), int(interval(..))."
MAX_RANGE = 100_000  # numbers of one range, which are listed
Value = str | int | float
Point = dict[str, Value]  # a value for each key of the space, as the study keeps it


@dataclass(frozen=True)
class Values:
    """Some values, kept as the texts that stand behind the = of an override."""

    texts: tuple[str, ...]

    def listed(self) -> list[Value]:
        return list(self.texts)


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high, both included. step: only low + n x step; None: all. is_log: even in the logarithm."""

    low: float
    high: float
    step: float | None = None
    is_log: bool = False
    is_int: bool = False

    def listed(self) -> list[Value] | None:
        """All of its numbers; None where they cannot be counted."""
        if self.step is None:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        values = [self.low + number * self.step for number in range(count)]
        return [int(value) for value in values] if self.is_int else list(values)


Dimension = Values | Interval


@dataclass(frozen=True)
class Space:
    """The keys that are searched, and the overrides that every trial has."""

    dimensions: dict[str, Dimension]  # key of an override, with its plus if it has one
    fixed: tuple[str, ...]

    def overrides(self, point: Mapping[str, Value]) -> list[str]:
        """The overrides of one trial."""
        return [*self.fixed, *(f"{key}={_text(point[key])}" for key in self.dimensions)]

    def points(self) -> Iterator[Point]:
        """All points, the last key changing fastest. Only where each dimension can be listed."""
        lists = [dimension.listed() or [] for dimension in self.dimensions.values()]
        for values in itertools.product(*lists):
            yield dict(zip(self.dimensions, values, strict=True))

    @property
    def size(self) -> int | None:
        """Its number of points; None where it has an interval."""
        lists = [dimension.listed() for dimension in self.dimensions.values()]
        return None if any(one is None for one in lists) else math.prod(len(one) for one in lists if one is not None)

    def intervals(self) -> list[str]:
        """The keys whose values cannot be listed."""
        return [key for key, dimension in self.dimensions.items() if dimension.listed() is None]

    def corners(self) -> list[Point]:
        """The first and the last combination."""
        ends = [_ends(dimension) for dimension in self.dimensions.values()]
        return [{key: end[i] for key, end in zip(self.dimensions, ends, strict=True)} for i in (0, 1)]

    def described(self) -> dict[str, Any]:
        """As plain values, to be compared with those of another command."""
        return {key: _described(dimension) for key, dimension in self.dimensions.items()}

    def distributions(self) -> dict[str, Any]:
        """The same in Optuna's terms."""
        return {key: _distribution(dimension) for key, dimension in self.dimensions.items()}


def read_space(params: Mapping[str, str], overrides: Sequence[str], folders: list[Any]) -> Space:
    """The space of the params of a yaml file and of a command line, which has the last word for each key.

    Raises ConfigError for what is not understood, and where there is nothing to search.
    """
    given: dict[str, tuple[str, Override]] = {}
    for text in [*(f"{key}={value}" for key, value in params.items()), *overrides]:
        override = parse_override(text)
        key = override.get_key_element()
        given.pop(key.lstrip("+"), None)
        given[key.lstrip("+")] = (text, override)
    swept = {key: pair for key, pair in given.items() if pair[1].is_sweep_override()}
    if not swept:
        raise ConfigError(
            "there is nothing to search: no key has several values.",
            at="command line",
            do=f"{GRAMMAR[:-1]}, or choose a search space: +sweep=<name>.",
        )
    dimensions = {pair[1].get_key_element(): _dimension(*pair, folders) for pair in swept.values()}
    return Space(dimensions, tuple(text for key, (text, _) in given.items() if key not in swept))


def _dimension(text: str, override: Override, folders: list[Any]) -> Dimension:
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
    texts = (
        value.filter(group_options(override.key_or_group, folders))
        if isinstance(value, Glob)
        else list(override.sweep_string_iterator())
        if isinstance(value, ChoiceSweep | list)
        else []
    )
    if not texts:
        raise ConfigError(f"{override.key_or_group} has no values to choose from.", at=at, do=GRAMMAR)
    twice = next((one for one in texts if texts.count(one) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} stands there twice.", at=at, do="give each value once.")
    return Values(tuple(texts))


def _interval(value: IntervalSweep, is_log: bool, at: str) -> Interval:
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    if not low < high or not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"the interval from {low:g} to {high:g} is empty.", at=at, do="give the lower end first.")
    if is_log and low <= 0:
        raise ConfigError(f"an interval from {low:g} has no logarithm.", at=at, do="start above 0, or leave out log.")
    return Interval(low, high, is_log=is_log, is_int=isinstance(low, int), step=_int_step(low, is_log))


def _int_step(low: float, is_log: bool) -> float | None:
    return 1 if isinstance(low, int) and not is_log else None


def _range(value: RangeSweep, at: str) -> Interval:
    count = (float(value.stop or 0) - float(value.start or 0)) / float(value.step) if value.step else 0.0
    if count > MAX_RANGE:
        raise ConfigError(
            f"the range has {count:.0f} numbers.", at=at, do="write interval(low,high), or a larger step."
        )
    numbers = list(value.range()) if value.step else []
    if not numbers:
        raise ConfigError("the range is empty.", at=at, do="write range(start,stop,step), where stop is left out.")
    low, high = float(min(numbers)), float(max(numbers))
    is_int = all(isinstance(number, int) for number in numbers)
    return Interval(low, high, step=abs(float(value.step)), is_int=is_int)


def _text(value: Value) -> str:
    return value if isinstance(value, str) else repr(value)


def _ends(dimension: Dimension) -> tuple[Value, Value]:
    if isinstance(dimension, Values):
        return dimension.texts[0], dimension.texts[-1]
    return (int(dimension.low), int(dimension.high)) if dimension.is_int else (dimension.low, dimension.high)


def _described(dimension: Dimension) -> Any:
    if isinstance(dimension, Values):
        return list(dimension.texts)
    kind = ("int " if dimension.is_int else "") + ("log " if dimension.is_log else "")
    return f"{kind}{dimension.low!r} to {dimension.high!r}" + (f" by {dimension.step!r}" if dimension.step else "")


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    if isinstance(dimension, Values):
        return distributions.CategoricalDistribution(dimension.texts)
    low, high, step, is_log = dimension.low, dimension.high, dimension.step, dimension.is_log
    if dimension.is_int:
        return distributions.IntDistribution(int(low), int(high), log=is_log, step=int(step or 1))
    return distributions.FloatDistribution(low, high, log=is_log, step=step)
