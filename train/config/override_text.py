"""What stands behind the = of an override, for Hydra to read: a path is written as the shell hands it over.

Hydra's grammar takes neither é nor ' nor ( ) nor = nor ~ outside of quotes. So for a setting that takes a path,
hydra_form() quotes what was typed. What is Hydra's own keeps its meaning:

    null                       no value
    'x', "x"                   a text in quotes: what is between them
    [x,y]                      a list, of a setting that takes one; each item by these rules. ./[x] is a path
    ${x}                       the value of another setting, also inside of a text
    x\\,y                       an escaped character, where Hydra can read the whole text
    x,y  choice(x,y)  glob(*)  several values, in a sweep

In one run a path may be called x,y or choice(x,y), and where one path is taken [x]. Other texts, such as names, are
quoted only where Hydra cannot read them, so that `name=a,b` stays the mistake that it is. A setting that takes
something else (numbers, options, raw keys) is Hydra's alone.
"""

import re
import shlex
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from tunesmith.train.config.config import Config

# Text settings that name files or folders.
PATHS = frozenset(
    {"output_dir", "model.name_or_path", "data.train", "data.validation", "data.chat_template", "data.cache_dir"}
    | {"engine.nvme_path", "resume.source", "cluster.hostfile", "cluster.container", "cluster.container_python"}
    | {"cluster.container_mounts"}
)
OF_A_SWEEP = frozenset({"hydra.sweeper.storage", "hydra.sweeper.study_name"})
OVERRIDE = re.compile(r"(?P<head>\+{0,2}(?P<key>[^=+~]+)=)(?P<value>.*)", re.DOTALL)
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
QUOTED_ITEM = re.compile(rf"(?:{QUOTED.pattern})(?=\s*(?:[,\]]|$))", re.DOTALL)


def quoted(text: str) -> str:
    """A value that Hydra reads as this text, whatever characters it has, but for ${...}."""
    return QuotedString(text, Quote.single).with_quotes()


def hydra_form(override: str, *, several: bool = False) -> str:
    """The override as Hydra is to read it; itself where that is what was typed. several: values are, for a sweep."""
    match = OVERRIDE.fullmatch(override)
    if match is None:
        return override
    head, key, value = match["head"], match["key"], match["value"]
    kind = text_settings().get(key)
    if kind is None or _is_hydras(value):
        return override
    known = parsed(override)
    if known is not None and (key not in PATHS or _is_escaped(known, value)):
        return override
    if kind is list and _is_list(value):
        return f"{head}{_items(value)}"
    if known is not None and several and known.is_sweep_override():
        return override
    if several and known is None and "," in value:
        return f"{head}{','.join(map(_item, split_items(value)))}"
    return f"{head}{quoted(value)}"


def override_of(key: str, value: object) -> str:
    """The override that gives a path or text to a setting: quoted only where it would mean something else."""
    plain, safe = f"{key}={value}", f"{key}={quoted(str(value))}"
    return plain if hydra_form(plain) == safe else safe


def typed(key: str, value: object) -> str:
    """As override_of(), for a person to type in a shell."""
    return shlex.quote(override_of(key, value))


def parsed(override: str) -> Override | None:
    """What Hydra reads; None where it cannot."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def split_items(text: str) -> list[str]:
    """What stands between the commas that are not inside of quotes or brackets; of all commas, if one stays open."""
    for has_lists in (True, False):
        items, start, place, depth = [], 0, 0, 0
        while place < len(text):
            if (quote := QUOTED_ITEM.match(text, place)) and text[start:place].strip(" [") == "":
                place = quote.end()
                continue
            depth += (text[place] == "[") - (text[place] == "]") if has_lists else 0
            if text[place] == "," and depth == 0:
                items.append(text[start:place].strip())
                start = place + 1
            place += 1
        if depth == 0:
            break
    return [*items, text[start:].strip()]


def _items(value: str) -> str:
    inner = value.strip()[1:-1]
    return f"[{','.join(map(_item, split_items(inner)))}]" if inner.strip() else "[]"


def _item(text: str) -> str:
    if _is_list(text):
        return _items(text)
    is_escaped = "\\" in text and parsed(f"item={text}") is not None
    return text if _is_hydras(text) or is_escaped else quoted(text)


def _is_hydras(value: str) -> bool:
    return not value or value.strip().lower() == "null" or QUOTED.fullmatch(value.strip()) is not None


def _is_escaped(known: Override, value: str) -> bool:
    return "\\" in value and not known.is_sweep_override() and isinstance(known.value(), str | list)


def _is_list(value: str) -> bool:
    return value.strip().startswith("[") and value.strip().endswith("]") and len(split_items(value)) == 1


@cache
def text_settings() -> dict[str, type]:
    """Each setting that takes a text (str), or a text or a list of them (list)."""
    found = dict[str, type](_texts_of(Config))
    return found | dict.fromkeys(OF_A_SWEEP, str)


def _texts_of(schema: type, prefix: str = "") -> Any:
    hints = get_type_hints(schema)
    for entry in fields(schema):
        key, hint = f"{prefix}{entry.name}", hints[entry.name]
        if is_dataclass(hint):
            yield from _texts_of(hint, f"{key}.")  # type: ignore[arg-type]
        elif get_origin(hint) is list or (hint is Any and not isinstance(entry.default, bool)):
            yield key, list
        elif hint is str or set(get_args(hint)) == {str, NoneType}:
            yield key, str
