"""The messages of a row, checked: each by itself, and that their order is one that a conversation has."""

import math
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from tunesmith.train.data.tool_calls import to_object, with_arguments

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTIONS = ("system", "developer")
UNASKED = object()
MAX_DEPTH = 64  # of objects and lists: what reads a row calls itself, and Python's limit is near 1000
MAX_WEIGHT = 3.4e38  # float32
# Spaces, and characters that nobody sees: zero-width ones, controls, fillers, joiners, variation selectors.
BLANK = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str | None  # None only on an assistant message that has tool_calls
    weight: float = 1.0  # of an assistant turn's tokens in the loss; 0: context only
    extra: dict[str, Any] = field(default_factory=dict)  # tool_calls, name, ...: for the chat template

    def as_dict(self) -> dict[str, Any]:
        """What the chat template sees: everything but the weight."""
        return {"role": self.role, "content": self.content, **self.extra}


class RowError(Exception):
    """One bad row: which field, what is wrong with it, and what to do."""

    def __init__(self, field_name: str, problem: str, do: str) -> None:
        super().__init__(f"{field_name}: {problem}" if field_name else problem)
        self.do = do


def parse_messages(messages: Any) -> list[Message]:
    """Raises RowError for the first thing wrong with them."""
    if not isinstance(messages, list):
        raise RowError(
            "messages", f"must be a list, not {kind_of(messages)}", 'write "messages": [{"role": ..., "content": ...}].'
        )
    parsed = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    _check_order(parsed)
    assistant = [message for message in parsed if message.role == "assistant"]
    if not assistant:
        raise RowError(
            "messages", "no assistant message, so there is nothing to learn", "add the answer, or delete the row."
        )
    if not any(message.weight > 0 for message in assistant):
        raise RowError(
            "messages",
            "every assistant message has weight 0, so there is nothing to learn",
            "give one a weight above 0, or delete the row.",
        )
    if all(message.role in ("assistant", "tool") for message in parsed):
        raise RowError(
            "messages",
            "nothing is asked: no message that is not the assistant's or a tool's",
            "add the user's message, or delete the row.",
        )
    return parsed


def _check_order(messages: list[Message]) -> None:
    """Instructions come first, once; a tool's result follows the call it answers."""
    roles = [message.role for message in messages]
    for index, role in enumerate(roles):
        if role in INSTRUCTIONS and roles[:index] not in ([], ["system"] if role == "developer" else []):
            problem = f"a second {role} message" if role in roles[:index] else f"a {role} message that is not the first"
            raise RowError(
                f"messages[{index}].role",
                problem,
                "put all instructions into one first message, or split the row.",
            )
    open_calls: list[Any] = []  # the ids of calls without a result yet
    for index, message in enumerate(messages):
        if message.role != "tool":
            open_calls = [call.get("id") for call in message.extra.get("tool_calls") or ()]
            continue
        answered = message.extra.get("tool_call_id")
        match = next((id_ for id_ in open_calls if answered is None or id_ in (None, answered)), UNASKED)
        if match is UNASKED:
            raise RowError(
                f"messages[{index}]",
                "a tool's result without its call" + (f" (tool_call_id {answered!r})" if answered else ""),
                "put the assistant message with its tool_calls right before the results, with their ids.",
            )
        open_calls.remove(match)


def _message(message: Any, at: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(at, f"must be an object, not {kind_of(message)}", 'write {"role": ..., "content": ...}.')
    if "role" not in message:
        raise RowError(f"{at}.role", "missing", f"one of {', '.join(ROLES)}.")
    role = message["role"]
    if role not in ROLES:
        raise RowError(f"{at}.role", f"unknown role {role!r}", f"one of {', '.join(ROLES)}.")
    calls_tools = bool(message.get("tool_calls"))
    if calls_tools and role != "assistant":
        raise RowError(
            f"{at}.tool_calls", f"on a {role} message, which calls nothing", "keep tool_calls on assistant messages."
        )
    content = message.get("content") if calls_tools else text_of(message, "content", f"{at}.content")
    if content is not None and not isinstance(content, str):
        raise RowError(f"{at}.content", f"must be a string, not {kind_of(content)}", "write the text of the message.")
    if role in ("user", "assistant") and not calls_tools and BLANK.fullmatch(content or ""):
        raise RowError(f"{at}.content", "empty", "write the text of the message, or delete the row.")
    if role in INSTRUCTIONS and content and BLANK.fullmatch(content):  # "" turns a template's own instructions off
        raise RowError(f"{at}.content", "nothing that can be seen", 'write the instructions, or "" for none.')
    extra = {
        name: value
        for name, value in message.items()
        if name not in ("role", "content", "weight") and value is not None
    }
    if calls_tools:
        extra["tool_calls"] = _tool_calls(message["tool_calls"], at)
    if is_too_deep(extra):
        raise RowError(at, f"nested more than {MAX_DEPTH} levels deep", "flatten it, or delete the row.")
    if typo := get_close_matches("weight", extra, n=1, cutoff=0.8):
        raise RowError(f"{at}.{typo[0]}", "unknown field; did you mean 'weight'?", "rename it to 'weight'.")
    return Message(role, content, _weight(message, role, at), extra)


def _tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function", {}), dict) for call in calls
    ):
        raise RowError(f"{at}.tool_calls", "must be a list of objects", "write them as in OpenAI's format.")
    parsed = []
    for index, call in enumerate(calls):
        try:
            parsed += with_arguments({"tool_calls": [call]}, to_object)["tool_calls"]
        except ValueError as error:
            raise RowError(
                f"{at}.tool_calls[{index}]",
                f"arguments are no JSON object: {error}",
                'write {"name": value, ...}, as an object or as JSON text.',
            ) from error
    return parsed


def _weight(message: dict[str, Any], role: str, at: str) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if role != "assistant":
        raise RowError(
            f"{at}.weight", f"on a {role} message, which is never learned", "keep weights on assistant messages."
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RowError(
            f"{at}.weight", f"must be a number, not {kind_of(weight)}", "write 0, 1 or any number of at least 0."
        )
    if not (math.isfinite(weight) and weight >= 0):
        raise RowError(f"{at}.weight", f"must be at least 0, not {weight}", "write 0, 1 or any number of at least 0.")
    if weight > MAX_WEIGHT:
        raise RowError(f"{at}.weight", f"does not fit into float32: {weight}", "write a smaller weight.")
    return float(weight)


def text_of(row: dict[str, Any], name: str, at: str) -> str:
    """The field of a row or message that holds text."""
    if name not in row:
        raise RowError(at, "missing", f"every row needs {name!r}.")
    text = row[name]
    if not isinstance(text, str):
        raise RowError(at, f"must be a string, not {kind_of(text)}", "write the text as one string.")
    if "\0" in text:
        raise RowError(at, "contains a NUL character", "delete the character.")
    return text


def is_too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_too_deep(item, levels - 1) for item in items)


def kind_of(value: Any) -> str:
    """A JSON value as an error names it."""
    if isinstance(value, bool | int | float):
        return f"{'true' if value is True else 'false' if value is False else value}"
    return {dict: "an object", list: "a list", str: f"the text {str(value)[:30]!r}", type(None): "null"}.get(
        type(value), type(value).__name__
    )
