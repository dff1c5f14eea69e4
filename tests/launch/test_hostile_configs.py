"""Configs that name code: refused, or carried as plain values that nobody runs. Nothing they name is even imported."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from tunesmith.train.config.compose import compose_config, load_resolved
from tunesmith.train.errors import ConfigError

PLANTED = "planted_by_a_config"  # a module that would leave the canary when it is imported
HEAD = "# @package _global_\n"


def targets(canary: str) -> dict[str, dict[str, Any]]:
    """Configs that leave the canary where they are instantiated, by the ways in that the advisories tell."""
    touch = f"open({canary!r}, 'w')"
    return {
        "os.system": {"_target_": "os.system", "_args_": [f"touch {canary}"]},
        "an alias of it": {"_target_": "logging.os.system", "_args_": [f"touch {canary}"]},
        "posix.system": {"_target_": "posix.system", "_args_": [f"touch {canary}"]},
        "builtins.exec": {"_target_": "builtins.exec", "_args_": [touch]},
        "builtins.eval": {"_target_": "builtins.eval", "_args_": [touch]},
        "subprocess": {"_target_": "subprocess.check_call", "_args_": [["touch", canary]]},
        "torch.load": {"_target_": "torch.load", "f": f"{canary}.pt", "weights_only": False},
        "torch.hub.load": {
            "_target_": "torch.hub.load",
            "repo_or_dir": f"{canary}.hub",
            "source": "local",
            "model": "m",
        },
        "runpy": {"_target_": "runpy.run_path", "path_name": f"{canary}.py"},
        "pickle": {"_target_": "pickle.loads", "data": f"cos\nsystem\n(S'touch {canary}'\ntR."},
        "a class": {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [canary]}},
        "a partial": {"_target_": "os.system", "_partial_": True, "_args_": [f"touch {canary}"]},
        "its own module": {"_target_": f"{PLANTED}.run"},
        "hydra.utils.call": {"_target_": "hydra.utils.call", "config": {"_target_": f"{PLANTED}.run"}},
        "yaml.unsafe_load": {"_target_": "yaml.unsafe_load", "stream": f"!!python/object/apply:os.mknod [{canary}]"},
        "a callable": {"_call_": f"{PLANTED}.run", "_recursive_": True, "_convert_": "all"},
    }


NAMES = list(targets(""))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What any code that runs would leave; checked after the test, as is that nothing was imported."""
    found = tmp_path / "canary"
    (tmp_path / f"{PLANTED}.py").write_text(f"open({str(found)!r}, 'w')\ndef run(): pass\n")
    (tmp_path / "canary.py").write_text(f"open({str(found)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield found
    assert not found.exists(), "code of a config has run"
    assert PLANTED not in sys.modules


Refusal = Callable[[dict[str, Any]], str]


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """refusal(tree) is what is said to a yaml file of a user's folder; "" where it is carried as plain values."""
    (tmp_path / "exp").mkdir()

    def said(tree: dict[str, Any]) -> str:
        (tmp_path / "exp/bad.yaml").write_text(HEAD + yaml.safe_dump(tree))
        try:
            composed = compose_config(["+exp=[debug,bad]"], tmp_path)
        except ConfigError as error:
            return str(error)
        assert composed.config.engine.deepspeed == tree["engine"]["deepspeed"]
        return ""

    return said


@pytest.mark.row(29)
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_yaml_file_is_refused_or_carried_as_plain_values(name: str, canary: Path, refusal: Refusal) -> None:
    target = targets(str(canary))[name]
    assert refusal(target).startswith("ConfigError: ")
    assert refusal({"engine": {"deepspeed": {"x": target, "y": [[{"z": [target]}]]}}}) == ""


@pytest.mark.parametrize("name", ["os.system", "torch.load", "its own module"])
def test_there_is_no_place_that_takes_it(name: str, canary: Path, refusal: Refusal, tmp_path: Path) -> None:
    target = targets(str(canary))[name]
    assert "there is no setting 'optimizer._" in refusal({"optimizer": target})
    assert refusal({"name": target})
    assert refusal({"seed": target})
    assert "data.train must be a path" in refusal({"data": {"train": [target]}})
    assert "track.tags must be a tag" in refusal({"track": {"tags": [target]}})
    assert "adapter.target_modules must be" in refusal({"adapter": {"target_modules": [[target]]}})
    assert "have no effect" in refusal({"hydra": {"callbacks": {"x": target}}})
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/bad.yaml").write_text(yaml.safe_dump(target))
    with pytest.raises(ConfigError, match=r"there is no setting 'optimizer\._"):
        compose_config(["+exp=debug", "optimizer=bad"], tmp_path)


@pytest.mark.row(29)
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_config_of_a_run_is_refused_when_it_is_read_back(name: str, canary: Path, tmp_path: Path) -> None:
    target = targets(str(canary))[name]
    resolved = compose_config(["+exp=debug"]).resolved
    path = tmp_path / "config.yaml"
    for changed in (resolved | target, resolved | {"model": resolved["model"] | target}, resolved | {"name": target}):
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(ConfigError):
            load_resolved(path)
    raw = resolved["engine"] | {"deepspeed": {"x": target}}
    path.write_text(yaml.safe_dump(resolved | {"engine": raw}))
    assert load_resolved(path).engine.deepspeed["x"] == target


@pytest.mark.row(29)
@pytest.mark.parametrize("form", ["_target_={0}", "+_target_={0}", "model._target_={0}", "++data.x._target_={0}"])
@pytest.mark.parametrize("target", ["os.system", "torch.load", "torch.hub.load", f"{PLANTED}.run", "builtins.exec"])
def test_a_hostile_override_is_refused(form: str, target: str, canary: Path) -> None:
    with pytest.raises(ConfigError, match="there is no setting"):
        compose_config(["+exp=debug", form.format(target)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.searchpath=[pkg://{planted}]", "Hydra only composes here"),
        ("+hydra.callbacks.x._target_={planted}.run", "Hydra only composes here"),
        ("hydra/launcher={planted}", "Hydra only composes here"),
        ("hydra.job.env_set.LD_PRELOAD=/tmp/x.so", "Hydra only composes here"),
        ("name=${{python:os.system}}", "Unsupported interpolation type python"),
        ("name=${{eval:1}}", "Unsupported interpolation type eval"),
        ("track.tags=[{{_target_:os.system}}]", "track.tags"),
        ("engine.deepspeed.wandb.enabled=true", "contradicts track.wandb"),
        (
            "engine.deepspeed.torch_autocast.lower_precision_safe_modules=[{planted}.run]",
            "contradicts engine.precision",
        ),
    ],
)
def test_hydra_resolvers_and_deepspeed_run_nothing_that_a_user_names(override: str, message: str, canary: Path) -> None:
    from tunesmith.train.zero import deepspeed_config

    with pytest.raises(ConfigError, match=message):
        deepspeed_config.check(compose_config(["+exp=debug", override.format(planted=PLANTED)]).config, world_size=1)


@pytest.mark.parametrize(
    "text",
    [
        f"{HEAD}defaults:\n  - override /hydra/launcher: {PLANTED}\n",
        f"{HEAD}defaults:\n  - /model@hydra.launcher: tiny\n",
        f"{HEAD}hydra:\n  searchpath: ['pkg://{PLANTED}']\n",
        f"{HEAD}name: !!python/object/apply:{PLANTED}.run []\n",
        f"{HEAD}name: !!python/module:{PLANTED}\n",
        f"# @package hydra.callbacks.x\n_target_: {PLANTED}.run\n",
    ],
)
def test_hydras_own_settings_in_a_users_yaml_are_refused(text: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose_config(["+exp=[debug,bad]"], tmp_path)
    assert f"{tmp_path}/exp/bad.yaml" in str(caught.value)


def test_no_resolver_is_registered_that_could_run_code() -> None:
    compose_config(["+exp=debug"])
    omegaconf = {"oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env", "oc.select"}
    assert set(BaseContainer._resolvers) == omegaconf | {"hydra", "now", "python_version"}


def test_the_config_of_a_run_cannot_ask_for_this_environment(tmp_path: Path) -> None:
    composed = compose_config(["+exp=debug"])
    composed.resolved["model"]["name_or_path"] = "someone/${oc.env:HF_TOKEN}"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(composed.resolved))
    with pytest.raises(ConfigError, match="is in the config of a run, which holds plain values"):
        load_resolved(path)


def test_these_configs_do_run_where_they_are_instantiated(tmp_path: Path) -> None:
    """The control: the canaries above can sing. In a process of its own, with Hydra's instantiate as others use it."""
    canary = tmp_path / "canary"
    (tmp_path / f"{PLANTED}.py").write_text(f"open({str(canary)!r}, 'w')\ndef run(): pass\n")
    config = tmp_path / "bad.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(targets(str(canary))["its own module"])))
    code = "import sys, hydra, omegaconf; hydra.utils.instantiate(omegaconf.OmegaConf.load(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(config)], env=environment, timeout=60, check=True)
    assert canary.exists()
