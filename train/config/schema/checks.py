"""Rules that many settings share. Each raises ConfigError with the key, what is wrong with its value, and what fits."""

import math
from dataclasses import fields
from typing import Any

from tunesmith.train.errors import ConfigError


def check_positive(group: str, **values: float | None) -> None:
    """Raises ConfigError for the first value that is given and not above 0, or not finite."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(
                f"{name} must be {'finite' if value == math.inf else 'above 0'}, not {value}.",
                key=f"{group}.{name}",
                do="give a finite number above 0.",
            )


def check_not_negative(group: str, **values: float) -> None:
    """Raises ConfigError for the first value below 0, or not finite."""
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(
                f"{name} must be {'finite' if value == math.inf else 'at least 0'}, not {value}.",
                key=f"{group}.{name}",
                do="give 0 or a finite number above it.",
            )


def check_fraction(group: str, **values: float) -> None:
    """Raises ConfigError for the first value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(
                f"{name} must be at least 0 and below 1, not {value}.",
                key=f"{group}.{name}",
                do="give a share of the whole, such as 0.05 for 5 %.",
            )


def check_bool(key: str, value: object) -> None:
    """Raises ConfigError unless value is a real bool: 'maybe', null and 1 are mistakes, not a yes."""
    if not isinstance(value, bool):
        raise ConfigError(
            f"{key} must be true or false, not {value!r}.", key=key, do="write true or false, without quotes."
        )


def check_strings(key: str, value: object, *, what: str = "path") -> None:
    """Raises ConfigError unless value is a string or a list of strings, none of them empty."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) and item.strip() for item in strings):
        raise ConfigError(
            f"{key} must be a {what} or a list of {what}s, not {value!r}.",
            key=key,
            do=f"write one {what}, or several as [one,two].",
        )


def check_no_empty_text(config: object, prefix: str = "") -> None:
    """Raises ConfigError for a text of a dataclass that is empty: mostly a shell variable that was never set."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, str) and not value.strip():
            key = f"{prefix}{field.name}"
            raise ConfigError(f"{key} is empty.", key=key, do="give it a value, or leave it out.")


def as_list(value: Any) -> list[str]:
    """One string or a list of strings, as a list."""
    return [value] if isinstance(value, str) else list(value)
