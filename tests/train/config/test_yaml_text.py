"""Yaml that would take all memory, all stack or all day: one error with its line, in every file of a person."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tunesmith.train.config import yaml_text
from tunesmith.train.config.compose import compose_config, load_resolved
from tunesmith.train.errors import ConfigError


def bomb(first: str, level: str) -> str:
    """Eleven lines; nine aliases in each for the line before."""
    lines = [f"a{number}: &a{number} {level.replace('?', f'*a{number - 1}')}" for number in range(1, 11)]
    return "\n".join([f"a0: &a0 {first}", *lines]) + "\n"


NINE = "[" + ",".join("?" * 9) + "]"
HOSTILE = {  # a mapping: words of the error, its line counted from 1
    "an alias for what it is in": ("a:\n  b: &x\n    c: *x\n", "*x stands for what it is part of", 3),
    "a merge of what it is in": ("a: &x\n  <<: *x\n", "*x stands for what it is part of", 2),
    "an alias bomb": (bomb("x", NINE), "more than 50,000 values", 6),
    "a bomb of empty lists": (bomb("[]", NINE), "more than 50,000 values", 6),
    "a bomb of mappings": (bomb("{}", "{" + ",".join(f"k{n}: ?" for n in range(9)) + "}"), "more than 50,000", 6),
    "deep brackets": ("a: " + "[" * 3_000, "nested more than 32 deep", 1),
    "deep blocks": ("".join(f"{' ' * depth}a:\n" for depth in range(2000)), "nested more than 32 deep", 32),
    "deep aliases": (bomb("[x]", "[[[[?]]]]"), "nested more than 32 deep", 9),
    "a number of 5,000 digits": (f"a: {'1' * 5000}\n", "4300 digits", None),
    "a word that is said to be a number": ("a: !!int x\n", "invalid literal for int()", None),
    "a word that is said to be a date": ("a: !!timestamp x\n", "", None),
    "two MiB": ("a: b\n" + "#" * (2 << 20), "the file has more than 2 MiB", None),
}


def as_experiment(folder: Path, text: str) -> None:
    write(folder / "exp/mine.yaml", f"# @package _global_\n{text}")
    compose_config(["+exp=mine"], folder)


def as_option(folder: Path, text: str) -> None:
    write(folder / "cluster/mine.yaml", f"\n{text}")
    compose_config(["cluster=mine"], folder)


def behind_a_defaults_list(folder: Path, text: str) -> None:
    write(folder / "model/mine.yaml", "defaults: [deep/inner, _self_]\n")
    write(folder / "model/deep/inner.yaml", f"\n{text}")
    compose_config(["model=mine"], folder)


def as_config_of_a_run(folder: Path, text: str) -> None:
    load_resolved(write(folder / "config.yaml", f"\n{text}"))


def as_search_space(folder: Path, text: str) -> None:
    from tunesmith.launch.sweeping.overrides import read_command_line, read_settings

    write(folder / "sweep/mine.yaml", f"# @package hydra.sweeper\n{text}")
    read_settings(read_command_line(["+sweep=mine"], [folder]))


def as_launcher(folder: Path, text: str) -> None:
    from tunesmith.launch.sweeping.submitit_slots import launcher_settings

    write(folder / "hydra/launcher/submitit_slurm.yaml", f"\n{text}")
    launcher_settings("submitit_slurm", {}, [folder])


WAYS_IN = [as_experiment, as_option, behind_a_defaults_list, as_search_space, as_launcher]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("way_in", "name"),
    [*((as_config_of_a_run, name) for name in HOSTILE), *((way_in, "an alias bomb") for way_in in WAYS_IN)],
)
def test_one_error_with_its_line_and_little_memory(
    way_in: Callable[[Path, str], None], name: str, tmp_path: Path
) -> None:
    text, words, line = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"this yaml is not read: ") as raised:
        way_in(tmp_path, text)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert words in raised.value.what
    assert "\n" not in raised.value.what
    assert str(raised.value.at).rpartition(".yaml")[2].strip(")") == (f":{line + 1}" if line else "")


def test_what_is_within_the_bounds_is_read() -> None:
    deep = "a: " + "[" * 31 + "]" * 31
    assert yaml_text.tree_of(deep) == yaml.safe_load(deep)
    shared = bomb("[1, 2]", "[?, ?]")
    assert yaml_text.tree_of(shared) == yaml.safe_load(shared)
    assert yaml_text.tree_of("a: &x [1]\nb: [*x, *x]\nc: &y 2\nd: *y\ne: 2026-99-99") == {
        "a": [1],
        "b": [[1], [1]],
        "c": 2,
        "d": 2,
        "e": "2026-99-99",
    }


def test_a_file_that_is_no_text_is_named_behind_a_defaults_list_too(tmp_path: Path) -> None:
    write(tmp_path / "model/mine.yaml", "defaults: [inner, _self_]\n")
    (tmp_path / "model/inner.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 4") as raised:
        compose_config(["model=mine"], tmp_path)
    assert str(raised.value.at).endswith("model/inner.yaml")
