"""The errors that a person can cause, each with what is wrong, where, and what to do."""

EXIT_MISTAKE = 2  # the user's input cannot be run
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command resumes


class Stopped(BaseException):
    """The run ends because it was asked to; raised on every rank, once everything is saved.

    Not an Exception: it may be raised wherever the signal finds the process, and no `except Exception` may catch it.
    """

    def __init__(self, reason: str, step: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.step = step  # optimizer steps done; None before the loop


class TunesmithError(Exception):
    """A mistake in what the user gave; printed without a traceback.

    Args:
        what: the problem in one sentence, with its numbers.
        at: the place: a config key with file and line, `data.jsonl:12`, a folder.
        do: the remedy.
        exit_code: EXIT_MISTAKE where the same command would fail again; 1 where it may succeed.
    """

    def __init__(
        self, what: str, *, at: str | None = None, do: str | None = None, exit_code: int = EXIT_MISTAKE
    ) -> None:
        super().__init__(what)
        self.what = what
        self.at = at
        self.do = do
        self.exit_code = exit_code

    def __str__(self) -> str:
        lines = [f"{type(self).__name__}: {self.what}"]
        if self.at:
            lines.append(f"  at: {self.at}")
        if self.do:
            lines.append(f"  do: {self.do}")
        return "\n".join(lines)


class ConfigError(TunesmithError):
    """A setting is unknown, impossible, or contradicts another. `key` is its dotted name, which leads to its line."""

    def __init__(self, what: str, *, key: str | None = None, at: str | None = None, do: str | None = None) -> None:
        super().__init__(what, at=at or key, do=do)
        self.key = key


class DataError(TunesmithError):
    """A training or validation file is missing or has a bad row."""


class ModelError(TunesmithError):
    """A model or tokenizer cannot be loaded, or cannot do what the config asks of it."""


class TrainingError(TunesmithError):
    """The run cannot go on: losses not finite, a checkpoint that does not fit, a model that reads back wrong."""
