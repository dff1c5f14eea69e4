"""Command lines of the launch scripts, and how their errors end."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tunesmith.train.errors import ConfigError, Stopped, TunesmithError
from tunesmith.train.paths import user_path
from tunesmith.train.ranks.stop import end, end_stopped, rank_in_environment, report_end
from tunesmith.train.redact import on_screen, print_traceback, redact_uncaught

EXIT_INTERRUPTED = 130  # Ctrl-C in a script that has nothing to save
OTHERS_WAIT_SECONDS = 15.0  # for rank 0 to print it first


def without_local_rank(arguments: list[str]) -> list[str]:
    """DeepSpeed's launcher appends --local_rank=N, which is in LOCAL_RANK too."""
    return [argument for argument in arguments if not re.fullmatch(r"--local[_-]rank(=\d+)?", argument)]


def show_help(arguments: Sequence[str], text: str | None) -> bool:
    """Whether --help is among the arguments; prints the text then."""
    is_asked = bool({"-h", "--help"} & set(arguments))
    if is_asked:
        sys.stdout.write(text or "")
    return is_asked


def run_argument(arguments: list[str], usage: str) -> str:
    """The one run folder that a command names, its options aside. Raises ConfigError."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError("give one run folder.", at="command line", do=usage)
    return arguments[0]


def sets(override: str, key: str) -> bool:
    """Whether an override gives a value to a setting, or chooses the option of a group."""
    return override.startswith((f"{key}=", f"+{key}=", f"++{key}="))


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name value` or `--name=value`, and the arguments without it."""
    rest, value, pending = [], None, False
    for argument in arguments:
        if pending:
            value, pending = argument, False
        elif argument == name:
            pending = True
        elif argument.startswith(f"{name}="):
            value = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    if pending or value == "":
        raise ConfigError(f"{name} needs a value.", at="command line", do=f"write {name} <value>.")
    return value, rest


def key_values(arguments: list[str], known: dict[str, str], usage: str) -> dict[str, str]:
    """key=value arguments over the known defaults. --help prints usage and ends. Raises ConfigError."""
    if show_help(arguments, usage):
        sys.exit(0)
    values = dict(known)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"{argument!r} is not understood.", at="command line", do=f"{usage.strip().splitlines()[0]}"
            )
        values[key] = value
    return values


def whole_number(values: dict[str, str], key: str) -> int:
    """The value of a key as a whole number above 0. Raises ConfigError."""
    if not values[key].isdecimal() or int(values[key]) < 1:
        raise ConfigError(f"{key}={values[key]} is not a whole number above 0.", at="command line")
    return int(values[key])


def run_dir_of(text: str) -> Path:
    """The run folder a user named. Raises ConfigError when it is none."""
    folder = user_path(text).absolute()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{text!r} is not a run folder: it has no config.yaml.",
            at="run",
            do="give the folder that training printed.",
        )
    return folder


def main(body: Callable[[list[str]], object]) -> NoReturn:
    """Runs a script's body: a user's mistake is printed as one message, and every way out has its exit code.

    Where several ranks meet the same mistake, rank 0 prints it and the others give the launcher time to end them.
    """
    redact_uncaught()
    try:
        body(without_local_rank(sys.argv[1:]))
    except Stopped as stopped:
        sys.stdout.flush()
        sys.stderr.flush()
        end_stopped(stopped.reason)
    except TunesmithError as error:
        if rank_in_environment() > 0:
            time.sleep(OTHERS_WAIT_SECONDS)
        sys.stderr.write(f"{on_screen(str(error))}\n")
        sys.stderr.flush()
        end(error.exit_code, on_screen(" ".join(error.what.split())))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        end(EXIT_INTERRUPTED)
    except Exception as error:  # here, as W&B puts a hook before ours that would print the secrets in it
        print_traceback(error)
        report_end(1)
        sys.exit(1)
    report_end(0)
    sys.exit(0)
