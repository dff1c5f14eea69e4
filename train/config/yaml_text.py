"""Reads yaml that people wrote, whatever is in it: each problem is a yaml.YAMLError with its line, found quickly.

The yaml library alone makes an endless tree of an alias for what it is part of, and runs out of stack in deep nesting;
OmegaConf copies what each alias stands for, so that ten lines make a billion nodes. Here the events are counted first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

MAX_BYTES = 2 << 20  # of a file: the yaml library reads some 150 kB a second
MAX_DEPTH = 32  # our own files have 5; OmegaConf runs out of stack at some hundreds
MAX_VALUES = 50_000  # with every alias written out: OmegaConf makes some 5,000 a second
BUILDING = (ValueError, TypeError, KeyError, AttributeError)  # of `!!int x`, and of a number of 5,000 digits


class NotBuilt(yaml.MarkedYAMLError):
    """Yaml of which no tree is built."""


class _Loader(yaml.SafeLoader):
    """As OmegaConf's: 2026-01-31 is a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass
class _Node:
    """A list or mapping, as far as it has been read."""

    anchor: str | None
    num_values: int = 1  # itself, and all that it holds
    height: int = 0  # of the tree: 0 holds nothing

    def take(self, inner: "_Node") -> None:
        self.num_values += inner.num_values
        self.height = max(self.height, inner.height + 1)


SCALAR = _Node(None)


def read_text(path: Path) -> str:
    """Raises OSError, UnicodeDecodeError, NotBuilt."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise NotBuilt(problem=f"the file has more than {MAX_BYTES >> 20} MiB")
    return data.decode()


def tree_of(text: str) -> Any:
    """As yaml.safe_load(), without dates. Raises yaml.YAMLError."""
    check(text)
    try:
        return _Loader(text).get_single_data()
    except BUILDING as error:
        raise NotBuilt(problem=" ".join(str(error).split())) from None


def nodes_of(text: str) -> yaml.Node | None:
    """The nodes; no object is built of them. Raises yaml.YAMLError."""
    check(text)
    return yaml.compose(text, Loader=yaml.SafeLoader)


def omegaconf_of(text: str) -> DictConfig | ListConfig:
    """As OmegaConf.create(). Raises yaml.YAMLError, OmegaConfBaseException."""
    tree_of(text)  # OmegaConf's loader raises what this turns into one kind of error
    return OmegaConf.create(text)


def check(text: str) -> None:
    """Raises yaml.YAMLError unless a tree of bounded depth and size can be built."""
    path = [_Node(None)]  # from the document down to where the events are
    closed: dict[str, _Node] = {}
    num_values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        problem = ""
        if isinstance(event, yaml.CollectionStartEvent):
            path.append(_Node(event.anchor))
            num_values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            inner = path.pop()
            path[-1].take(inner)
            if inner.anchor:
                closed[inner.anchor] = inner
        elif isinstance(event, yaml.AliasEvent) and event.anchor in [one.anchor for one in path]:
            problem = f"*{event.anchor} stands for what it is part of"
        elif isinstance(event, yaml.AliasEvent | yaml.ScalarEvent):
            value = closed.get(str(event.anchor), SCALAR) if isinstance(event, yaml.AliasEvent) else SCALAR
            path[-1].take(value)
            num_values += value.num_values
        if len(path) - 1 + path[-1].height > MAX_DEPTH:
            problem = f"it is nested more than {MAX_DEPTH} deep"
        elif num_values > MAX_VALUES:
            problem = f"it has more than {MAX_VALUES:,} values once every alias is written out"
        if problem:
            raise NotBuilt(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]  # or one of C
