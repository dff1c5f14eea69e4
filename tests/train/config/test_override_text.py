"""A path is written as the shell hands it over, in every override that takes one; what is Hydra's own stays Hydra's."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tunesmith.launch.supervise import with_output_dir
from tunesmith.launch.sweeping.overrides import read_command_line
from tunesmith.launch.sweeping.space import read_space
from tunesmith.train.config.compose import compose_config, parse_override
from tunesmith.train.config.config import Config
from tunesmith.train.config.override_text import PATHS, hydra_form, quoted, text_settings, typed
from tunesmith.train.config.tree import schema_keys
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import CONF_DIR, resolve_path, user_path

ODD = [  # each as one argument of a program
    *(
        "données (1).jsonl",
        "l'été/x.jsonl",
        'a "b".jsonl',
        "日本語/データ.jsonl",
        "a\u0301.jsonl",
        'it\'s (1), "2" & [3].jsonl',
    ),
    *("a=b.jsonl", "a,b.jsonl", "a [1].jsonl", "[1] a.jsonl", "{a} b.jsonl", "$HOME/$x.jsonl", "~nobody-at-all/x", "~"),
    *("a;b&c|d<e>f", "#a!", "`b`", "%j", "a:b@c", "a*?b", "-x", "./[a]", "x\\y", "a\tb", " a b "),
    *(
        "007",
        "1e5",
        "true",
        "0x1f",
        "1_000",
        "nullable",
        "choice(a,b)",
        "glob(*)",
        "range(1,3)",
        "a(b",
        "a)b",
        "'a",
        "'a' b'",
    ),
    "/" + "/".join(["très long"] * 30),
]
LISTS = [key for key, kind in text_settings().items() if kind is list and key in PATHS]


@pytest.mark.parametrize("path", ODD)
def test_a_path_is_what_was_typed(path: str) -> None:
    for key in sorted(PATHS):
        for override in (f"{key}={path}", f"++{key}={path}"):
            assert parse_override(override).value() == path, key
            assert hydra_form(hydra_form(override)) == hydra_form(override)


@pytest.mark.parametrize("path", ODD)
def test_what_is_printed_for_a_shell_comes_back(path: str) -> None:
    assert parse_override(f"output_dir={quoted(path)}").value() == path
    for text in (path, f"'{path}'", "null", "'x'"):
        (argument,) = shlex.split(typed("output_dir", text))
        assert parse_override(argument).value() == text
    command, folder = with_output_dir(["train.py", f"output_dir={path}"])
    assert folder == user_path(path).absolute()
    assert command[-1] == f"output_dir={path}"


@pytest.mark.parametrize(
    "path", [path for path in ODD if "," not in path and path == path.strip() and "glob" not in path]
)
def test_so_is_each_item_of_a_list_and_each_value_of_a_sweep(path: str) -> None:
    assert LISTS == ["data.train", "data.validation", "cluster.container_mounts"]
    for key in LISTS:
        override = parse_override(f"{key}=[{path}, 'x,y' ,{path}]")
        assert override.value() == [path, "x,y", path]
    for text in (f"data.train={path},b (2).jsonl", f"data.train=[{path}],[b (2).jsonl]"):
        space = read_space({}, ["+exp=debug", text, f"data.cache_dir={path}"], [CONF_DIR])
        first, second = ([parse_override(one).value() for one in space.overrides(point)] for point in space.points())
        inner: Any = (lambda name: [name]) if "],[" in text else str
        assert first == ["debug", path, inner(path)]
        assert second == ["debug", path, inner("b (2).jsonl")]


MEANS = {  # what is Hydra's own
    "output_dir=null": None,
    "output_dir=": "",
    "output_dir='null'": "null",
    "output_dir='l\\'été'": "l'été",
    'output_dir="a,b"': "a,b",
    "data.train=[]": [],
    "data.train=[ a.jsonl , \"b,c\",'d' ]": ["a.jsonl", "b,c", "d"],
    "data.train=[null,x]": [None, "x"],
    "data.train=[[a b],[c]]": [["a b"], ["c"]],
    "data.train=a\\,b\\ \\(1\\)": "a,b (1)",
    "data.train=[a\\,b,c]": ["a,b", "c"],
    "data.train=${oc.env:HOME}/é.jsonl": "${oc.env:HOME}/é.jsonl",
    "cluster.env=[A=b c,PATH]": ["A=b c", "PATH"],
    "track.tags=[é,two words]": ["é", "two words"],
    "name=Größe (1)": "Größe (1)",
    "seed=1": 1,
    "engine.deepspeed.x=[1,2]": [1, 2],
    "batch.global_batch_size='8'": "8",
}


@pytest.mark.parametrize("override", MEANS)
def test_what_is_hydras_own_keeps_its_meaning(override: str) -> None:
    assert parse_override(override).value() == MEANS[override]


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("data.train=a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
        ("data.train=choice(a,b)", ["a", "b"]),
        ("data.train='a,b',c", ["a,b", "c"]),
        ("data.train=a\\,b,c", ["a,b", "c"]),
        ("data.train=[a,b],[c]", [["a", "b"], ["c"]]),
        ("name=a,b", ["a", "b"]),
        ("hydra.sweeper.storage=sqlite:///l'été (1)/x.db?timeout=5", None),
    ],
)
def test_a_sweep_has_several_values_where_hydra_says_so(text: str, texts: list[Any] | None) -> None:
    line = read_command_line([text], [CONF_DIR])
    if texts is None:
        assert line.values == {"hydra.sweeper.storage": "sqlite:///l'été (1)/x.db?timeout=5"}
        return
    space = read_space({}, line.training, [CONF_DIR])
    assert [parse_override(space.overrides(point)[0]).value() for point in space.points()] == texts


def test_all_of_them_reach_the_config(tmp_path: Path) -> None:
    keys = [key for key in sorted(PATHS) if not key.startswith(("cluster.container", "engine"))]
    pairs = dict(zip(keys, ODD, strict=False))
    composed = compose_config(["+exp=debug", *(f"{key}={path}" for key, path in pairs.items())])
    for key, path in pairs.items():
        group, _, name = key.rpartition(".")
        assert getattr(getattr(composed.config, group) if group else composed.config, name) == path


def test_every_setting_that_takes_a_path_is_known() -> None:
    assert set(text_settings()) >= PATHS
    assert set(schema_keys()) >= PATHS
    named = {key for key in text_settings() if key.rpartition(".")[2].endswith(("dir", "path", "file", "mounts"))}
    assert named == {key for key in named if key in PATHS}
    assert "model" in {entry.name for entry in fields(Config)}


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("engine.deepspeed.a=données (1)", "'engine.deepspeed.a='\"'\"'données (1)'\"'\"''"),
        ("objective.settings.file=a=b", "'objective.settings.file='\"'\"'a=b'\"'\"''"),
    ],
)
def test_what_hydra_alone_reads_is_shown_in_quotes(override: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(override)
    assert str(caught.value.do).endswith(f"{shown}.")
    (argument,) = shlex.split(shown)
    assert parse_override(argument).value() == override.partition("=")[2]


@pytest.mark.parametrize(
    "override", [f"engine.deepspeed.x={'[' * 300}", f"engine.deepspeed{'.a' * 300}=1", f"{'a' * 300}=1"]
)
def test_what_is_nested_too_deep_is_one_error(override: str) -> None:
    with pytest.raises(ConfigError, match="is nested more than 32 deep"):
        compose_config(["+exp=debug", override])


def test_a_tilde_is_the_home_folder_only_where_somebody_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/é")
    assert user_path("~/x") == Path("/home/é/x")
    assert resolve_path("~/x") == "/home/é/x"
    assert user_path("~nobody-at-all") == Path("~nobody-at-all")
    assert user_path("a~") == Path("a~")
