"""Names, links and files that lead elsewhere: nothing outside the run folder is written, read or removed."""

import gzip
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.train.config.compose import compose_config
from tunesmith.train.data.cache import open_or_build
from tunesmith.train.data.records import read_records
from tunesmith.train.data.sources import Source, find_sources
from tunesmith.train.errors import ConfigError, DataError, ModelError
from tunesmith.train.files import run_folder
from tunesmith.train.model.foreign_code import check_index

ROW = '{"prompt": "How do I log in?", "completion": "With your e-mail."}\n'
SMALL = ("+exp=debug", "data.validation=[]", "evaluate.every_steps=null", "evaluate.generate=false")
TWO_STEPS = ("batch.sequence_length=128", "schedule.max_steps=2", "checkpoint.every_steps=1")
Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A run of one of two steps: it holds a config and a checkpoint, and can be gone on with."""
    root = tmp_path_factory.mktemp("finished")
    (root / "rows.jsonl").write_text(ROW)
    done = command("train", root, *overrides(root, root / "run"), "schedule.max_steps=1")
    assert done["code"] == 0, done["stderr"]
    return root


def overrides(root: Path, run: Path) -> list[str]:
    return [*SMALL, *TWO_STEPS, f"data.train={root}/rows.jsonl", f"data.cache_dir={root}/cache", f"output_dir={run}"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LINKS = {  # a path in the run folder -> what it leads to outside
    "checkpoints": "elsewhere/checkpoints",
    "config.yaml": "elsewhere/config.yaml",
    "model": "elsewhere/model",
    "metrics.jsonl": "elsewhere/metrics.jsonl",
    "summary.json": "elsewhere/summary.json",
    ".tunesmith-lock": "elsewhere/lock",
    "wandb": "elsewhere/wandb",
    "best": "elsewhere/best",
    "checkpoints/.staged-step-000002": "elsewhere/staged",
    "checkpoints/step-000002": "elsewhere/step",
}


def plant_link(run: Path, name: str, tmp_path: Path) -> Path:
    """The entry of the run folder lies elsewhere, with a link in its place; an empty folder where there was none."""
    target = tmp_path / LINKS[name]
    target.parent.mkdir(exist_ok=True)
    if (run / name).exists():
        shutil.move(run / name, target)
    else:
        target.mkdir()
    (run / name).symlink_to(target)
    return target


@pytest.mark.row(33)
@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_the_run_folder_is_found(name: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    run_folder.check_usable(run, "auto")
    target = plant_link(run, name, tmp_path)
    if name == "config.yaml":
        shutil.copy(finished / "run/config.yaml", target)
    with pytest.raises(ConfigError) as caught:
        run_folder.check_usable(run, "auto")
    assert caught.value.what == f"{name} in the run folder is a link to {target}, outside of it."


@pytest.mark.row(33)
@pytest.mark.parametrize("name", ["checkpoints", "config.yaml"])
def test_nothing_is_written_or_removed_behind_a_link(
    name: str, finished: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    plant_link(run, name, tmp_path)
    before = contents(tmp_path / "elsewhere")
    assert before
    answer = command("train", tmp_path, *overrides(finished, run))
    assert answer["code"] == 2, answer["stderr"]
    assert answer["stderr"].startswith(f"ConfigError: {name} in the run folder is a link")
    assert contents(tmp_path / "elsewhere") == before


def test_the_run_folder_itself_may_be_a_link_and_wandbs_links_stay(tmp_path: Path) -> None:
    (tmp_path / "disk/wandb/offline-run-1").mkdir(parents=True)
    (tmp_path / "disk/wandb/latest-run").symlink_to("offline-run-1")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/wandb/offline-run-1/logs").mkdir()
    (tmp_path / "disk/wandb/offline-run-1/logs/debug-core.log").symlink_to("/root/.cache/wandb/logs/core-debug-1.log")
    run_folder.check_links(tmp_path / "run")
    (tmp_path / "disk/debug-core.log").symlink_to("/root/.cache/wandb/logs/core-debug-1.log")
    with pytest.raises(ConfigError, match=r"ConfigError: debug-core.log in the run folder is a link"):
        run_folder.check_links(tmp_path / "run")
    (tmp_path / "disk/debug-core.log").unlink()
    (tmp_path / "disk/wandb/latest-run").unlink()
    (tmp_path / "disk/wandb/latest-run").symlink_to("../../..")
    with pytest.raises(ConfigError, match=r"wandb/latest-run in the run folder is a link to \.\./\.\./\.\."):
        run_folder.check_links(tmp_path / "run")


@pytest.mark.row(33)
@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", ".", "a\\nb", "a\\x00b"])
def test_the_name_of_a_run_is_one_part_of_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        compose_config(["+exp=debug", "name='" + name.encode().decode("unicode_escape") + "'"])


@pytest.mark.parametrize("output_dir", ["a\0b", "a\nb", "a\x1b[2Jb"])
def test_an_output_folder_has_a_name_that_can_be_seen(output_dir: str) -> None:
    config = compose_config(["+exp=debug"]).config
    config.output_dir = output_dir
    with pytest.raises(ConfigError, match="cannot name a folder"):
        run_folder.choose(config)


SHELL = ["$(touch CANARY)", "`touch CANARY`", "a;touch CANARY", "a|touch CANARY", "a&touch CANARY", "a && touch CANARY"]
SHELL += [
    "'; touch CANARY; '",
    '"; touch CANARY; "',
    "a b",
    " a",
    "*",
    "?",
    "~root",
    "-rf",
    "--help",
    "#x",
]
SHELL += ["a\\b", "\\", "%s%n", "{0.__class__}", "!x", "<(touch CANARY)", "> CANARY", "$HOME", "äöü", "名前", "a=b,c=d"]


@pytest.mark.row(31)
@pytest.mark.parametrize("text", SHELL)
def test_shell_characters_in_a_path_are_characters(text: str) -> None:
    quoted = text.replace("\\'", "\\\\'").replace("'", "\\'")
    if quoted.endswith("\\"):
        quoted += "\\"
    config = compose_config(["+exp=debug", f"output_dir='/x/{quoted}'"]).config
    assert run_folder.choose(config) == Path(f"/x/{text}")


@pytest.mark.row(31)
def test_a_run_in_a_folder_named_like_a_command_runs_no_command(
    tmp_path: Path, finished: Path, command: Command
) -> None:
    """`..` is the user's own word; what it names is used, and nothing beside it."""
    (tmp_path / "a").mkdir()
    folder = "$(touch CANARY); `touch CANARY` && touch CANARY"
    given = [text for text in overrides(finished, tmp_path) if not text.startswith("output_dir")]
    answer = command("train", tmp_path, *given, f"output_dir='a/../{folder}/run'", "schedule.max_steps=1")
    assert answer["code"] == 0, answer["stderr"]
    assert {path.split("/")[0] for path in answer["left"]} == {folder}
    assert not list(tmp_path.rglob("CANARY"))


@pytest.mark.row(21)
def test_devices_pipes_and_folders_are_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("/dev/zero", "/dev/stdin", "/dev/random", str(tmp_path / "pipe.jsonl"), str(tmp_path / "zero.jsonl")):
        with pytest.raises(DataError, match="there is no file or folder"):
            read_records(find_sources([name]))
    for name in (str(tmp_path), str(tmp_path / "folder.jsonl")):
        with pytest.raises(DataError, match=r"holds no \.jsonl or \.jsonl\.gz file"):
            read_records(find_sources([name]))
    with pytest.raises(DataError, match="no file matches"):
        read_records(find_sources([str(tmp_path / "*.jsonl")]))


@pytest.mark.row(21)
def test_a_line_of_50_mb_is_named_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW.encode() + b'{"prompt": "' + b"a" * 50_000_000 + b'", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: the line has more than 32 MiB") as caught:
        read_records(find_sources([str(path)]))
    assert caught.value.do


@pytest.mark.parametrize("unit", [b"a", ROW.encode()])
def test_a_small_file_that_unpacks_to_a_thousand_times_its_size_is_refused(unit: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(70):
            file.write(unit * (2**20 // len(unit) + 1))
    with pytest.raises(DataError, match=r"unpacks to more than 200 times its size|line has more than 32 MiB"):
        for _ in find_lines(path):
            pass


def find_lines(path: Path) -> Any:
    return Source(str(path), path).lines()


@pytest.mark.row(33)
@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "part.bin", "sub/x.safetensors", ".."])
def test_a_list_of_weight_files_names_files_of_its_folder_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "b": name}})
    )
    with pytest.raises(ModelError, match="is no safetensors file of this folder"):
        check_index(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_list_of_weight_files_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="can't be read"):
        check_index(tmp_path)


def test_prepared_data_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        build = lambda empty: (empty / "x").write_text("x") and None  # noqa: E731
        folder = open_or_build(tmp_path / "cache", "name", lambda: ("key", build))
    finally:
        os.umask(before)
    assert folder.is_dir()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
