"""The arguments of tool calls: a JSON object, or JSON text in OpenAI's form. A chat template takes one of the two."""

import json
from collections.abc import Callable
from typing import Any

import orjson


def to_object(arguments: Any) -> Any:
    """The object that JSON text spells; what is no text stays. Raises ValueError for text that spells no object."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = orjson.loads(arguments) if arguments.strip() else {}  # "" is how OpenAI writes a call without arguments
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError("JSON, but no object")
    return value


def to_text(arguments: Any) -> str:
    """As transformers' `tojson` writes it in a chat template."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A message whose tool calls have other arguments; the same object where it has none."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    return {**message, "tool_calls": [_changed(call, change) for call in calls]}


def _changed(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _changed(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call
