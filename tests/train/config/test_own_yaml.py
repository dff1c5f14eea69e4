"""A person's own yaml files: used like ours, and every mistake in them named with file and line."""

from pathlib import Path

import pytest

from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import ConfigError

HEAD = "# @package _global_\n"


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("folder_name", ["mine", "it's, mine", "my conf [1] ä"])
def test_own_experiments_and_options_work_like_ours(tmp_path: Path, folder_name: str) -> None:
    folder = tmp_path / folder_name
    write(folder, "model/mine.yaml", "# Mine.\nname_or_path: some/model\n")
    defaults = "defaults:\n  - override /model: mine\n  - override /engine: zero3\n"
    raw = "engine:\n  deepspeed:\n    zero_optimization:\n      reduce_bucket_size: 1000\n"
    write(folder, "exp/my_bot.yaml", f"{HEAD}{defaults}name: my_bot\n{raw}")
    config = compose_config(["+exp=my_bot", "data.train=x.jsonl"], folder).config
    assert (config.name, config.model.name_or_path, config.engine.stage) == ("my_bot", "some/model", 3)
    assert config.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}


MISTAKES = {  # text of exp/bad.yaml: words of the problem, line, words of the remedy
    f"{HEAD}optimizer:\n  lr: 3\n": ("Did you mean optimizer.learning_rate?", 3, "docs/config.md"),
    f"{HEAD}optimizer:\n  _target_: os.system\n": ("there is no setting 'optimizer._target_'.", 3, "docs/config.md"),
    f"{HEAD}_target_: os.system\n": ("there is no setting '_target_'.", 2, "docs/config.md"),
    f"{HEAD}learning_rate: 3\n": ("Did you mean optimizer.learning_rate?", 2, "docs/config.md"),
    f"{HEAD}batch:\n  global_batch_size: abc\n": ("could not be converted to Integer", 3, "give a whole number."),
    f"{HEAD}seed: 1\noptimizer:\n  learning_rate: -1\n": ("learning_rate must be above 0, not -1.0.", 4, "above 0"),
    f'{HEAD}model:\n  trust_remote_code: "true"\n': ("must be true or false, not 'true'", 3, "without quotes"),
    f"{HEAD}model:\n  trust_remote_code: 1\n": ("must be true or false, not 1", 3, "without quotes"),
    f"{HEAD}model:\n  trust_remote_code: null\n": ("must be true or false, not None", 3, "without quotes"),
    f"{HEAD}optimizer: 3\n": ("optimizer is a group of settings, not 3.", 2, "override /optimizer"),
    f"{HEAD}optimizer: adamw\n": ("optimizer is a group of settings, not 'adamw'.", 2, "override /optimizer"),
    f"{HEAD}name: ${{nope}}\n": ("Interpolation key 'nope' not found", 2, "correct the ${...}"),
    f"{HEAD}defaults:\n  - override /model: tinny\n": ("Did you mean tiny?", 2, "choose one of"),
    f"{HEAD}defaults:\n  - override /modle: tiny\n": (
        "there is no group 'modle'. Did you mean model?",
        2,
        "lists every",
    ),
    f"{HEAD}optimizer:\n  learning_rate: [1\nseed: 3\n": ("not valid yaml", 4, "correct that line"),
    f"{HEAD}batch:\n\tglobal_batch_size: 3\n": ("not valid yaml", 3, "correct that line"),
    f"{HEAD}seed: 1\nseed: 2\n": ("found duplicate key seed", 3, "correct that line"),
    f"{HEAD}- 3\n": ("the file holds a list, not settings.", 1, "key: value"),
    f"{HEAD}": ("the file holds nothing, not settings.", 1, "key: value"),
    "optimizer:\n  learning_rate: 3\n": ("its keys are those of the whole run", 1, "# @package _global_"),
    "": ("its keys are those of the whole run", 1, "# @package _global_"),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.items(), ids=lambda value: str(value)[:40])
def test_a_mistake_is_named_with_file_and_line(tmp_path: Path, text: str, expected: tuple[str, int, str]) -> None:
    problem, line, remedy = expected
    path = write(tmp_path, "exp/bad.yaml", text)
    with pytest.raises(ConfigError) as caught:
        compose_config(["+exp=bad", "model=tiny", "data.train=x.jsonl"], tmp_path)
    what_line, at_line, do_line = str(caught.value).splitlines()
    assert problem in what_line
    assert f"{path}:{line}" in at_line
    assert remedy in do_line


def test_a_mistake_in_an_own_option_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model/mine.yaml", "# Mine.\nname_or_path: x\nrevison: main\n")
    write(tmp_path, "exp/bot.yaml", f"{HEAD}defaults:\n  - override /model: mine\n")
    for overrides in (["model=mine"], ["+exp=bot"]):
        with pytest.raises(ConfigError) as caught:
            compose_config([*overrides, "data.train=x.jsonl"], tmp_path)
        assert "Did you mean model.revision?" in str(caught.value)
        assert caught.value.at == f"model.revison ({path}:3)"


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "exp/bad.yaml", b"# @package _global_\nname: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 27") as caught:
        compose_config(["+exp=bad", "data.train=x.jsonl"], tmp_path)
    assert caught.value.at == str(path)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch {canary}']", "!!python/name:os.system", "!!python/module:os"]
)
def test_yaml_tags_construct_nothing(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    path = write(tmp_path, "exp/bad.yaml", f"{HEAD}name: {tag.replace('{canary}', str(canary))}\n")
    with pytest.raises(ConfigError, match="not valid yaml") as caught:
        compose_config(["+exp=bad", "data.train=x.jsonl"], tmp_path)
    assert caught.value.at == f"{path}:2"
    assert not canary.exists()


def test_a_name_that_tunesmith_uses_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "exp/debug.yaml", f"{HEAD}seed: 5\n")
    with pytest.raises(ConfigError, match="has the name of a file of Tunesmith") as caught:
        compose_config(["+exp=debug"], tmp_path)
    assert caught.value.do == "give your file another name."


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "nope"
    if kind == "a file":
        folder.write_text("")
    with pytest.raises(ConfigError, match="there is no folder") as caught:
        compose_config(["+exp=debug"], folder)
    assert caught.value.at == "--config-dir"
