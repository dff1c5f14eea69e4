"""Writes docs/config.md from the schema, its comments and the yaml files of conf/.

python -m tunesmith.launch.config_docs            write it
python -m tunesmith.launch.config_docs --check    say whether it is up to date; exit code 1 when it is not
"""

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf

from tunesmith.launch.arguments import main
from tunesmith.train.config.compose import SEARCH_SPACES, type_in_words
from tunesmith.train.config.config import Config
from tunesmith.train.config.tree import compose_tree
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import CONF_DIR

PAGE = CONF_DIR.parent / "docs" / "config.md"
INTRO = """\
# Every setting

Written by `python -m tunesmith.launch.config_docs` from the schema (`train/config/config.py`, `train/config/schema/`)
and the files of `conf/`; a test fails when it is stale. `python launch/train.py --help` lists the groups, `... --cfg`
prints the config that a command line makes.

## How to write it

| you write | it means |
|---|---|
| `engine=zero3` | another option of a group: the file `conf/engine/zero3.yaml` |
| `batch.global_batch_size=64` | another value |
| `+exp=support_bot` | an experiment: a file of `conf/exp/` that holds what differs. `+exp=[one,two]`: two changes one |
| `data.train=[one.jsonl,two.jsonl]` | a list |
| `"data.train=l'été/données (1).jsonl"` | a path as it is called, in quotes for your shell alone |
| `schedule.epochs=null schedule.max_steps=500` | no value for one, a value for the other |
| `engine.deepspeed.zero_optimization.reduce_bucket_size=50000000` | a raw DeepSpeed key |

A path may hold any character. `./[a]` is a path and `[a]` a list, `./null` a path and `null` no value; all of the rule
stands in `train/config/override_text.py`.

What wins: the command line, then the experiment, then the option of the group, then `conf/config.yaml`.
A key that does not exist, a value that does not fit and settings that contradict each other end the run before anything
is loaded, with the key, its file and line, and what to do.

**Your own files.** `--config-dir my_conf` searches `my_conf/` beside `conf/`: `my_conf/exp/my_bot.yaml` is
`+exp=my_bot`, `my_conf/model/mine.yaml` is `model=mine`. An experiment starts like this:

```yaml
# @package _global_
defaults:
  - override /model: qwen2_5_0_5b
  - override /adapter: lora

name: my_bot
data:
  train: my/train.jsonl
```

**Raw DeepSpeed keys** under `engine.deepspeed` are added to what Tunesmith makes of its own settings. A key that one of
those decides (batch sizes, precision, ZeRO stage, offload device, clipping, optimizer, schedule) is an error that names
the setting to use. In a yaml file they are written as in DeepSpeed's JSON, below `engine: deepspeed:`.

The default is the value of a run that chooses nothing; **needed** means that there is none. `null` means no value.
"""


def page() -> str:
    """The text of docs/config.md."""
    values: Any = OmegaConf.to_container(compose_tree([]), enum_to_str=True)
    hints = get_type_hints(Config)
    top = [field for field in fields(Config) if not is_dataclass(hints[field.name])]
    parts = [INTRO, "## The run\n", _table(Config, top, values, "")]
    for field in fields(Config):
        if is_dataclass(hint := hints[field.name]):
            parts.append(f"## {field.name}\n\n{_cell(inspect.getdoc(hint) or '')}\n")
            parts.append(_table(hint, list(fields(hint)), values[field.name], f"{field.name}."))
            parts.append(_options(field.name))
    parts += ["## exp\n\nWhole experiments, as differences from the defaults.\n", _options("exp")]
    parts += ["## sweep\n\nSearch spaces of `launch/sweep.py -m`; docs/sweeps.md.\n", _options(SEARCH_SPACES)]
    return "\n".join(parts)


def _table(schema: Any, rows: list[Field[Any]], values: dict[str, Any], prefix: str) -> str:
    hints, comments = get_type_hints(schema), field_comments(schema)
    lines = ["| key | takes | default | what it means |", "|---|---|---|---|"]
    for field in rows:
        takes = _takes(hints[field.name], field)
        value = values.get(field.name)
        default = "**needed**" if value == "???" else f"`{_inline(value)}`"
        lines.append(f"| `{prefix}{field.name}` | {takes} | {default} | {_cell(comments.get(field.name, ''))} |")
    return "\n".join(lines) + "\n"


def _takes(hint: Any, field: Field[Any]) -> str:
    if hint is Any:  # its dataclass checks it: OmegaConf would turn "yes" into true, and knows no `text or list`
        return "true or false" if isinstance(field.default, bool) else "a text or a list of texts"
    return type_in_words(hint)


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")  # or the one ends the cell, the other opens a tag


def _options(group: str) -> str:
    listed = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    defaults = {name: option for entry in listed if isinstance(entry, dict) for name, option in entry.items()}
    lines = ["| option | what it is |", "|---|---|"]
    for option in sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")):
        name = f"+{group}={option}" if group in ("exp", SEARCH_SPACES) else f"{group}={option}"
        mark = " (default)" if defaults.get(group) == option else ""
        lines.append(f"| `{name}`{mark} | {_cell(first_comment(CONF_DIR / group / f'{option}.yaml'))} |")
    return "\n".join(lines) + "\n"


def first_comment(path: Path) -> str:
    """The first comment of a yaml file that is not Hydra's; empty without one."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and not text.startswith("# @package"):
            return text.lstrip("# ")
    return ""


def field_comments(schema: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, its bases included."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            found |= _own_comments(base)
    return found


def _own_comments(schema: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = [comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
            found[node.target.id] = " ".join(beside)
    return found


def write(arguments: list[str]) -> None:
    """Writes the page, or with --check compares it. Raises ConfigError when it is stale."""
    if arguments not in ([], ["--check"]):
        raise ConfigError(
            f"{' '.join(arguments)!r} is not understood.", at="command line", do="give --check or nothing."
        )
    text = page()
    if not arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise ConfigError(
            "docs/config.md is stale.",
            at=str(PAGE),
            do="run python -m tunesmith.launch.config_docs and commit the page.",
        )


if __name__ == "__main__":
    main(write)
