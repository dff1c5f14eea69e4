"""Removes secrets from what is written: configs, log lines, tracebacks.

Two rules, since each alone misses some. By name: the value of a key such as api_key is hidden, whatever it is.
By value: what the environment or the command line holds under such a name is hidden wherever it occurs.
"""

import itertools
import os
import re
import sys
import threading
import traceback
from typing import Any

from tunesmith.train.printable import printable

HIDDEN = "***"


def words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


SECRET_WORDS = words_of("apikey authorization cookie credential credentials passphrase passwd password secret secrets")
SECRET_PAIRS = frozenset(
    {(kind, "key") for kind in ("access", "account", "api", "encryption", "license", "private", "signing", "ssh")}
    | {("connection", "string")}
)
# `token` is also a word of the field: these come before it in tokenizer and metric names.
TOKENIZER_WORDS = words_of(
    "added additional audio begin bos cls decoder each end eoi eos extra fim first forced image last loss mask max min"
    " next num of pad per prompt sep special start stop turn unk video vision"
)
NAMES_A_PLACE = words_of("dir env file name path sock type var")  # HF_TOKEN_PATH says where the token is, not what

# Shorter values are words, not secrets: hiding every "test" would make a config unreadable.
MIN_LENGTH = 8
# Libraries shorten what they quote and add dots: the beginning of a longer secret is hidden there too.
MIN_START = 12
SHORTENED = re.compile(r"\.\.\.|…")

USERINFO = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)|(?<=://)[^\s/@:'\"]{8,}(?=@)")
# name=value, --name value, 'name': 'value'
ASSIGNMENT = re.compile(r"""(?P<name>[\w.\-]+)(?P<equals>=|['"]\s*:\s*)(?P<quote>['"]?)(?P<value>[^\s'"&,;]+)""")
SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w\-]{20,}"
    r"|A[KS]IA[0-9A-Z]{16}|xox[abprs]-[\w\-]{10,}|wandb_v\d_\w{20,}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]{5,})"
)
BEARER = re.compile(r"(?i)(\bbearer|\bauthorization\W{1,4}basic)\s+[\w.~+/=\-]{8,}")


def names_a_secret(key: str) -> bool:
    """Whether a key of this name holds a secret: api_key, hf_token, MYSQL_PWD; not max_new_tokens, eos_token, PWD."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.rsplit(".", 1)[-1])
    words = [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
    if not words or words[-1] in NAMES_A_PLACE:
        return False
    if SECRET_WORDS.intersection(words) or SECRET_PAIRS.intersection(itertools.pairwise(words)):
        return True
    if words[-1] == "auth" or (words[-1] == "pwd" and len(words) > 1):  # PWD alone is the working directory
        return True
    return words[-1] == "token" and (len(words) == 1 or words[-2] not in TOKENIZER_WORDS)


def redact(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy without secrets; keys, order and all other values stay."""
    secrets = known_secrets()
    return {key: _redact_value(key, value, secrets) for key, value in config_dict.items()}


def redact_text(text: str) -> str:
    """The text without secrets: known values, name=value pairs, passwords in URLs, strings in the shape of a token."""
    return _redact_text(text, known_secrets())


def on_screen(text: str) -> str:
    """As a text is shown to people: without secrets, and without what would drive their terminal."""
    return printable(redact_text(text))


def print_traceback(error: BaseException) -> None:
    """Prints to stderr as Python does, without secrets."""
    sys.stderr.write(on_screen("".join(traceback.format_exception(error))))
    sys.stderr.flush()


def redact_uncaught() -> None:
    """From now on the tracebacks that Python itself prints, of this thread and of others, are without secrets."""

    def of_a_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
            print_traceback(arguments.exc_value)

    sys.excepthook = lambda kind, error, trace: print_traceback(error)
    threading.excepthook = of_a_thread


def known_secrets() -> list[str]:
    """Values that the environment and the command line hold under the name of a secret, and passwords in their URLs."""
    values = [value for name, value in os.environ.items() if names_a_secret(name)]
    for text in [*os.environ.values(), *sys.argv]:
        for userinfo in USERINFO.findall(text):
            values += [userinfo, userinfo.rpartition(":")[2]]
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if names_a_secret(name.lstrip("+~-")):
            values.append(value if equals else following)
    secrets = {value.strip().strip("'\"") for value in values}
    return sorted((value for value in secrets if len(value) >= MIN_LENGTH), key=len, reverse=True)


def _redact_value(key: object, value: Any, secrets: list[str]) -> Any:
    if isinstance(key, str) and names_a_secret(key) and not (value is None or value == "" or isinstance(value, bool)):
        return HIDDEN
    if isinstance(value, dict):
        return {name: _redact_value(name, item, secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_value(None, item, secrets) for item in value]
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, int | float) or value is None:
        return HIDDEN if str(value) in secrets else value
    text = str(value)
    return value if _redact_text(text, secrets) == text else _redact_text(text, secrets)


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
        if len(secret) > MIN_START and secret[:MIN_START] in text:
            text = _without_shortened(text, secret)
    text = USERINFO.sub(HIDDEN, text)
    text = ASSIGNMENT.sub(_redact_assignment, text)
    return SHAPES.sub(HIDDEN, BEARER.sub(rf"\1 {HIDDEN}", text))


def _without_shortened(text: str, secret: str) -> str:
    """Hides each beginning of the secret that is followed by dots."""
    first, *parts = text.split(secret[:MIN_START])
    clean = first
    for part in parts:
        pairs = enumerate(zip(part, secret[MIN_START:], strict=False))
        length = next((at for at, (one, other) in pairs if one != other), min(len(part), len(secret) - MIN_START))
        is_shortened = SHORTENED.match(part, length)
        clean += (HIDDEN + part[length:]) if is_shortened else secret[:MIN_START] + part
    return clean


def _redact_assignment(match: re.Match[str]) -> str:
    if not names_a_secret(match["name"]):
        return match[0]
    return f"{match['name']}{match['equals']}{match['quote']}{HIDDEN}"
