"""JSONL -> records. Every bad row is found before anything trains, and named `file:line: field: problem`."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import orjson

from tunesmith.train.data.messages import (
    BLANK,
    MAX_DEPTH,
    Message,
    RowError,
    is_too_deep,
    kind_of,
    parse_messages,
    text_of,
)
from tunesmith.train.data.sources import Source
from tunesmith.train.errors import DataError

# A form of rows -> its fields; the first form of which a row has a field is that of its file.
REQUIRED = {"messages": ("messages",), "completion": ("prompt", "completion")}
FIELDS = {"messages": ("messages", "tools"), "completion": ("prompt", "completion")}
# Fields of other formats: ignoring one of these would train on something else than what the author of the file meant.
FOREIGN_FIELDS = frozenset(
    {"system", "instruction", "input", "output", "response", "question", "answer", "context", "history", "text"}
    | {"conversations", "conversation", "chosen", "rejected", "functions", "function_call", "weight", "label"}
)
MAX_SHOWN = 5  # bad rows written out in one error


@dataclass(frozen=True)
class Record:
    """One training example."""

    place: str  # file.jsonl:12
    messages: list[Message]  # prompt and completion are a user and an assistant message
    form: str = "messages"  # or "completion": the row had a prompt and a completion
    tools: list[dict[str, Any]] | None = None  # JSON schemas, for the chat template


def read_records(sources: list[Source]) -> list[Record]:
    """All records of files and hub datasets, in order.

    Raises: DataError for a source that can't be read, is no JSON Lines or empty, and for bad rows: up to five are
        named, all are counted.
    """
    records: list[Record] = []
    errors: list[tuple[str, RowError]] = []
    for source in sources:
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
        yield f"{source.name}:{number}", row


def _not_json(line: bytes, error: orjson.JSONDecodeError) -> RowError:
    if b"\0" in line:
        return RowError("", "NUL bytes; the file is not UTF-8 text, or was damaged", "save the file as UTF-8.")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return RowError(
            "", f"not UTF-8 at byte {bad.start + 1} of the line (0x{line[bad.start]:02x})", "save the file as UTF-8."
        )
    return RowError("", f"not JSON: {error.msg} at column {error.colno}", "write one JSON object a line.")


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
        prompt, completion = (text_of(row, name, name) for name in FIELDS[form])
        for name, text, use in (("prompt", prompt, "answer"), ("completion", completion, "learn")):
            if BLANK.fullmatch(text):
                raise RowError(name, f"empty, so there is nothing to {use}", f"write the {name}, or delete the row.")
        return Record(place, [Message("user", prompt), Message("assistant", completion)], form)
    return Record(place, parse_messages(row["messages"]), form, _tools(row.get("tools")))


def _check_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise RowError("", f"not a JSON object but {kind_of(row)}", "write one JSON object a line.")


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


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(
            "tools", f"must be a list of JSON schemas, not {kind_of(tools)}", "write them as in OpenAI's format."
        )
    if is_too_deep(tools):
        raise RowError("tools", f"nested more than {MAX_DEPTH} levels deep", "flatten it, or delete the row.")
    return tools or None


def _names(row: dict[str, Any]) -> str:
    return ", ".join(list(row)[:8]) or "no field"
