"""Refuses secrets on a command line that is written to files: by a sweep, or into the script of a job."""

from collections.abc import Iterable

from tunesmith.train.config.compose import parse_override
from tunesmith.train.errors import ConfigError
from tunesmith.train.redact import redact, redact_text


def refuse_secrets(overrides: Iterable[str], at: str, what: str = "a sweep") -> None:
    """Raises ConfigError for the first override that holds one, without quoting it.

    Args:
        at: where they come from.
        what: would write them to a file.
    """
    for text in overrides:
        key = text.split("=", 1)[0]
        if holds_secret(text):
            raise ConfigError(
                f"{key} holds a secret, and {what} writes down what it is given.",
                at=f"{at}: {key}=...",
                do="take it out: HF_TOKEN, WANDB_API_KEY and the like are read from the environment.",
            )


def holds_secret(text: str) -> bool:
    """Whether an override holds what would be hidden where it is printed: by its names, values or shape."""
    ends = [number + 1 for number, letter in enumerate(text) if letter == "="]  # track.group='password=...' is nested
    if any(is_secret(text[start:]) for start in (0, *ends)):
        return True
    override = parse_override(text)
    tree = {override.key_or_group: override.value()}
    return redact(tree) != tree


def is_secret(text: str) -> bool:
    """Whether a text would not be printed as it is."""
    return redact_text(text) != text
