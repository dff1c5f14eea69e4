"""JSONL -> records. Every bad row is found before anything trains, and named `file:line: field: problem`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import orjson

from tunesmith.train.data.sources import Source, find_sources
from tunesmith.train.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
# A form of rows -> its fields; the first form of which a row has a field is that of its file.
REQUIRED = {"messages": ("messages",), "completion": ("prompt", "completion")}
FIELDS = {"messages": ("messages", "tools"), "completion": ("prompt", "completion")}
# Fields of other formats: ignoring one of these would train on something else than what the author of the file meant.
FOREIGN_FIELDS = frozenset(
    {"system", "instruction", "input", "output", "response", "question", "answer", "context", "history", "text"}
    | {"conversations", "conversation", "chosen", "rejected", "functions", "function_call", "weight", "label"}
)
MAX_WEIGHT = 3.4e38  # float32
MAX_SHOWN = 5  # bad rows written out in one error
MAX_DEPTH = 64  # of a row; a template that writes JSON runs out of stack at some hundreds


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str | None  # None only on an assistant message that has tool_calls
    weight: float = 1.0  # of an assistant turn's tokens in the loss; 0: context only
    extra: dict[str, Any] = field(default_factory=dict)  # tool_calls, name, ...: for the chat template, as they came

    def as_dict(self) -> dict[str, Any]:
        """What the chat template sees: everything but the weight."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Record:
    """One training example."""

    place: str  # file.jsonl:12
    messages: list[Message]  # prompt and completion are a user and an assistant message
    form: str = "messages"  # or "completion": the row had a prompt and a completion
    tools: list[dict[str, Any]] | None = None  # JSON schemas, for the chat template


class RowError(Exception):
    """One bad row: which field, what is wrong with it, and what to do."""

    def __init__(self, field_name: str, problem: str, do: str) -> None:
        super().__init__(f"{field_name}: {problem}" if field_name else problem)
        self.do = do


def read_records(names: list[str]) -> list[Record]:
    """All records of files, folders, globs and hub datasets, in order.

    Raises: DataError for a source that is missing or empty, and for bad rows: up to five are named, all are counted.
    """
    records: list[Record] = []
    errors: list[tuple[str, RowError]] = []
    for source in find_sources(names):
        num_before = len(records) + len(errors)
        form: str | None = None
        for place, row in _rows(source):
            try:
                if isinstance(row, RowError):
                    raise row
                form = form or _form(row)
                records.append(_parse(row, form, place))
            except RowError as error:
                errors.append((place, error))
        if len(records) + len(errors) == num_before:
            raise DataError(
                f"{source.name} has no rows.", at=source.name, do="give a file with one JSON object a line."
            )
    if errors:
        raise _bad_rows(errors)
    return records


def _bad_rows(errors: list[tuple[str, RowError]]) -> DataError:
    lines = [f"{place}: {error}" for place, error in errors[:MAX_SHOWN]]
    remedies = list(dict.fromkeys(error.do for _, error in errors[:MAX_SHOWN]))
    if len(errors) == 1:
        return DataError(lines[0], do=remedies[0])
    shown = f"the first {MAX_SHOWN}" if len(errors) > MAX_SHOWN else "all"
    return DataError("\n  ".join([f"{len(errors)} bad rows, {shown}:", *lines]), do="\n      ".join(remedies))


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row; a RowError in place of a row that is not JSON. Blank lines are passed over."""
    if source.path is None:
        for number, row in enumerate(source.rows()):
            given = [form for form, names in REQUIRED.items() if any(row.get(name) is not None for name in names)]
            names = FIELDS[given[0]] if given else ()  # other columns are many
            yield f"{source.name}:{number}", {name: row[name] for name in names if row.get(name) is not None} or row
        return
    for number, line in enumerate(source.lines(), start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            row = _not_json(line, error)
        if line.count(b"{") + line.count(b"[") > MAX_DEPTH and _is_deep(row):
            row = RowError("", f"nested more than {MAX_DEPTH} deep", "write a flatter record.")
        yield f"{source.name}:{number}", row


def _is_deep(row: Any) -> bool:
    """Whether templates and errors, which are recursive, could run out of stack."""
    level = [row]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def _not_json(line: bytes, error: orjson.JSONDecodeError) -> RowError:
    if b"\0" in line:
        return RowError("", "NUL bytes; the file is not UTF-8 text, or was damaged", "save the file as UTF-8.")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return RowError(
            "", f"not UTF-8 at byte {bad.start + 1} of the line (0x{line[bad.start]:02x})", "save the file as UTF-8."
        )
    do = "write one JSON object a line."
    if line.lstrip().startswith(b"["):
        do = "write one JSON object a line: jq -c '.[]' data.json > data.jsonl."
    return RowError("", f"not JSON: {error.msg} at column {error.colno}", do)


def _form(row: Any) -> str:
    """One of FIELDS, by the fields of a file's first row."""
    _check_object(row)
    for form, required in REQUIRED.items():
        if any(name in row for name in required):
            return form
    names = [name for names in FIELDS.values() for name in names]
    for name in row:
        if close := get_close_matches(name.lower(), names, n=1, cutoff=0.7):
            raise RowError(name, f"unknown field; did you mean {close[0]!r}?", f"rename it to {close[0]!r}.")
    raise RowError(
        "",
        f"neither {' nor '.join(' and '.join(names) for names in REQUIRED.values())}, but {_names(row)}",
        "give {prompt, completion} or {messages: [...]} rows.",
    )


def _parse(row: Any, form: str, place: str) -> Record:
    _check_object(row)
    other = next((name for name in FIELDS if name != form and any(key in row for key in FIELDS[name])), None)
    if other and FIELDS[form][0] not in row:
        raise RowError(
            FIELDS[other][0],
            f"this file's rows have {' and '.join(REQUIRED[form])}, this one has {_names(row)}",
            "keep one form in a file.",
        )
    _check_fields(row, form)
    if form == "completion":
        prompt, completion = (_text(row, name, name) for name in FIELDS[form])
        if not completion.strip():
            raise RowError("completion", "empty, so there is nothing to learn", "write the answer, or delete the row.")
        return Record(place, [Message("user", prompt), Message("assistant", completion)], form)
    return Record(place, _messages(row["messages"]), form, _tools(row.get("tools")))


def _check_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise RowError("", f"not a JSON object but {_kind(row)}", "write one JSON object a line.")


def _check_fields(row: dict[str, Any], form: str) -> None:
    """Known fields must be there; others are ignored unless they look like a typing error or are another format's."""
    known = FIELDS[form]
    required = REQUIRED[form]
    missing = [name for name in required if name not in row]
    for name in row:
        if name in known:
            continue
        if close := get_close_matches(name.lower(), missing, n=1, cutoff=0.8):
            raise RowError(name, f"unknown field; did you mean {close[0]!r}?", f"rename it to {close[0]!r}.")
        if name in FOREIGN_FIELDS or any(name in names for names in FIELDS.values()):
            raise RowError(
                name, f"not a field of {'/'.join(required)} rows", "put it into messages (docs/data.md), or delete it."
            )
    if missing:
        raise RowError(missing[0], "missing", f"every row of this file needs {' and '.join(required)}.")


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise RowError(
            "messages", f"must be a list, not {_kind(messages)}", 'write "messages": [{"role": ..., "content": ...}].'
        )
    parsed = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
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
    return parsed


def _message(message: Any, at: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(at, f"must be an object, not {_kind(message)}", 'write {"role": ..., "content": ...}.')
    if "role" not in message:
        raise RowError(f"{at}.role", "missing", f"one of {', '.join(ROLES)}.")
    role = message["role"]
    if role not in ROLES:
        raise RowError(f"{at}.role", f"unknown role {role!r}", f"one of {', '.join(ROLES)}.")
    calls_tools = role == "assistant" and bool(message.get("tool_calls"))
    content = message.get("content") if calls_tools else _text(message, "content", f"{at}.content")
    if content is not None and not isinstance(content, str):
        raise RowError(f"{at}.content", f"must be a string, not {_kind(content)}", "write the text of the message.")
    if role in ("user", "assistant") and not calls_tools and not (content or "").strip():
        raise RowError(f"{at}.content", "empty", "write the text of the message, or delete the row.")
    extra = {
        name: value
        for name, value in message.items()
        if name not in ("role", "content", "weight") and value is not None
    }
    if typo := get_close_matches("weight", extra, n=1, cutoff=0.8):
        raise RowError(f"{at}.{typo[0]}", "unknown field; did you mean 'weight'?", "rename it to 'weight'.")
    return Message(role, content, _weight(message, role, at), extra)


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
            f"{at}.weight", f"must be a number, not {_kind(weight)}", "write 0, 1 or any number of at least 0."
        )
    if not (math.isfinite(weight) and weight >= 0):
        raise RowError(f"{at}.weight", f"must be at least 0, not {weight}", "write 0, 1 or any number of at least 0.")
    if weight > MAX_WEIGHT:
        raise RowError(f"{at}.weight", f"does not fit into float32: {weight}", "write a smaller weight.")
    return float(weight)


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(
            "tools", f"must be a list of JSON schemas, not {_kind(tools)}", "write them as in OpenAI's format."
        )
    return tools or None


def _text(row: dict[str, Any], name: str, at: str) -> str:
    if name not in row:
        raise RowError(at, "missing", f"every row needs {name!r}.")
    text = row[name]
    if not isinstance(text, str):
        raise RowError(at, f"must be a string, not {_kind(text)}", "write the text as one string.")
    if "\0" in text:
        raise RowError(at, "contains a NUL character", "delete the character.")
    return text


def _kind(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return f"{'true' if value is True else 'false' if value is False else value}"
    return {dict: "an object", list: "a list", str: f"the text {str(value)[:30]!r}", type(None): "null"}.get(
        type(value), type(value).__name__
    )


def _names(row: dict[str, Any]) -> str:
    return ", ".join(list(row)[:8]) or "no field"
