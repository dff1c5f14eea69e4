"""A sweep hands its config to Hydra, which runs what some of its keys name: none of them gets there."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.launch.sweeping.command import run
from tunesmith.train.errors import ConfigError

PLANTED = "planted_by_a_sweep"  # a module that would leave the canary when it is imported
HEAD = "# @package hydra.sweeper\n"
SEARCH = "optimizer.learning_rate=1e-3,1e-2"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What any code that runs would leave; checked after the test, as is that nothing was imported or written."""
    found = tmp_path / "canary"
    (tmp_path / f"{PLANTED}.py").write_text(f"open({str(found)!r}, 'w')\ndef run(*_, **__): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield found
    assert not found.exists(), "code of a config has run"
    assert PLANTED not in sys.modules
    assert not (tmp_path / "runs").exists(), "the sweep has begun"


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(
    "override",
    [
        f"hydra.callbacks.x._target_={PLANTED}.run",
        f"+hydra.callbacks.x._target_={PLANTED}.run",
        f"++hydra.callbacks={{x: {{_target_: {PLANTED}.run}}}}",
        f"hydra.sweeper._target_={PLANTED}.run",
        f"+hydra.sweeper.evil._target_={PLANTED}.run",
        f"hydra.sweeper.params={{x: {{_target_: {PLANTED}.run}}}}",
        f"hydra.launcher._target_={PLANTED}.run",
        f"hydra={{sweeper: {{_target_: {PLANTED}.run}}}}",
        f"hydra/launcher={PLANTED}",
        "hydra/sweeper=basic",
        "hydra/job_logging=colorlog",
        f"hydra.job_logging.handlers.console.class={PLANTED}.run",
        f"hydra.job_logging.handlers.console={{(): {PLANTED}.run}}",
        "hydra.launcher.setup=[touch canary]",
        f"hydra.launcher.additional_parameters.x._target_={PLANTED}.run",
        f"hydra.launcher.partition={{_target_: {PLANTED}.run}}",
        "hydra.searchpath=[pkg://evil]",
        "hydra.run.dir=/tmp/elsewhere",
        "hydra.sweep.dir=/tmp/elsewhere",
        "hydra.output_subdir=x",
        "hydra.job.chdir=true",
        "hydra.mode=RUN",
        "~hydra/launcher",
        "+hydra@x=y",
    ],
)
def test_a_hydra_key_that_names_something_to_run_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(["+exp=debug", SEARCH, override], None)
    assert error.value.at


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(
    "text",
    [
        f"# @package hydra\ncallbacks:\n  x: {{_target_: {PLANTED}.run}}\n",
        f"# @package _global_\nhydra:\n  callbacks:\n    x: {{_target_: {PLANTED}.run}}\n",
        f"# @package hydra.callbacks\nx: {{_target_: {PLANTED}.run}}\n",
        f"{HEAD}# @package hydra.callbacks\nx: {{_target_: {PLANTED}.run}}\n",
        f"n_trials: 3\nx: {{_target_: {PLANTED}.run}}\n",
        f"{HEAD}_target_: {PLANTED}.run\n",
        f"{HEAD}callbacks: {{x: {{_target_: {PLANTED}.run}}}}\n",
        f"{HEAD}params:\n  adapter.r: {{_target_: {PLANTED}.run}}\n",
        f"{HEAD}params: {{_target_: {PLANTED}.run}}\n",
        f"{HEAD}params:\n  hydra.callbacks.x._target_: {PLANTED}.run,{PLANTED}.walk\n",
        f"{HEAD}metric: {{_target_: {PLANTED}.run}}\n",
        f"{HEAD}direction: [{{_target_: {PLANTED}.run}}]\n",
        f"{HEAD}storage: !!python/object/apply:os.system [touch canary]\n",
        f"{HEAD}defaults:\n  - evil@hydra.callbacks\n",
        f"{HEAD}defaults:\n  - /exp@hydra.callbacks: evil\n",
        f"{HEAD}defaults:\n  - override /hydra/sweeper: evil\n",
        f"{HEAD}defaults:\n  - override /hydra/job_logging: evil\n",
    ],
)
def test_a_hostile_search_space_is_refused(text: str, tmp_path: Path) -> None:
    for group in ("sweep", "exp", "hydra/sweeper", "hydra/job_logging"):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "evil.yaml").write_text(f"x: {{_target_: {PLANTED}.run}}\n")
    (tmp_path / "conf/sweep/mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        run(["+exp=debug", SEARCH, "+sweep=mine"], tmp_path / "conf")
    assert error.value.at


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(
    "text",
    [
        f"# @package _global_\nhydra:\n  callbacks:\n    x: {{_target_: {PLANTED}.run}}\n",
        "# @package _global_\ndefaults:\n  - debug\n  - evil@hydra.callbacks\n",
        "# @package _global_\ndefaults:\n  - debug\n  - /exp@hydra.callbacks.x: evil\n",
        "# @package _global_\ndefaults:\n  - debug\n  - override /hydra/launcher: evil\n",
        "# @package _global_\ndefaults:\n  - debug\n  - /sweep: mine\n",
    ],
)
def test_a_hostile_experiment_is_refused(text: str, tmp_path: Path) -> None:
    for group in ("exp", "hydra/launcher", "sweep"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    (tmp_path / "conf/exp/evil.yaml").write_text(f"_target_: {PLANTED}.run\nx: {{_target_: {PLANTED}.run}}\n")
    (tmp_path / "conf/hydra/launcher/evil.yaml").write_text(f"_target_: {PLANTED}.run\n")
    (tmp_path / "conf/sweep/mine.yaml").write_text(f"# @package hydra.callbacks\nx: {{_target_: {PLANTED}.run}}\n")
    (tmp_path / "conf/exp/mine.yaml").write_text(text)
    for chosen in ("+exp=mine", "+exp=debug,mine"):
        with pytest.raises(ConfigError) as error:
            run([chosen, SEARCH], tmp_path / "conf")
        assert error.value.at
