"""Some of Hydra's keys name what a multirun of its own would run: a sweep takes none of them.

Nor does a secret that somebody types get into its folder.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.launch.sweeping.command import run
from tunesmith.launch.sweeping.overrides import read_command_line
from tunesmith.launch.sweeping.submitit_slots import launcher_settings
from tunesmith.train.errors import ConfigError

PLANTED = "planted_by_a_sweep"  # a module that would leave the canary when it is imported
HEAD = "# @package hydra.sweeper\n"
SEARCH = "optimizer.learning_rate=1e-3,1e-2"
SECRET = "Kanarie8-qW3eR5tY"
BY_SLURM = "hydra/launcher=submitit_slurm"
SLURM_LAUNCHER = "_target_: hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher\n"


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
        "# @package _global_\ndefaults:\n  - debug\nhydra:\n  job:\n    env_set: {PYTHONPATH: .}\n",
        "# @package _global_\ndefaults:\n  - debug\nhydra:\n  job:\n    env_copy: [HF_TOKEN]\n",
        '# @package _global_\ndefaults:\n  - debug\nhydra:\n  job:\n    name: "a\\ntouch canary #"\n',
        "# @package _global_\ndefaults:\n  - debug\nhydra:\n  job:\n    chdir: true\n",
        "# @package _global_\ndefaults:\n  - debug\nhydra:\n  sweep:\n    subdir: ../../elsewhere\n",
        "# @package _global_\ndefaults:\n  - debug\nhydra:\n  output_subdir: ../../elsewhere\n",
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


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("hydra.launcher.partition='a\ntouch canary #'", "is nothing that SLURM takes"),
        ("hydra.launcher.account='a;touch canary'", "is nothing that SLURM takes"),
        ("hydra.launcher.name='$(touch canary)'", "is nothing that SLURM takes"),
        ("hydra.launcher.gres='gpu:1 --wrap=x'", "is nothing that SLURM takes"),
        ("hydra.launcher.qos=--wrap", "is nothing that SLURM takes"),
        ("hydra.launcher.partition=${oc.env:HOME}", "is nothing that SLURM takes"),
        ("hydra.launcher.exclude='n1,`touch canary`'", "is nothing that SLURM takes"),
        ("hydra.launcher.constraint='a&b\n#SBATCH --wrap=x'", "is nothing that SLURM takes"),
        ("hydra.launcher.comment=x", "has no setting 'comment'"),
        ("hydra.launcher.submitit_folder=/tmp/elsewhere", "has no setting 'submitit_folder'"),
        ("hydra.launcher.array_parallelism=4", "has no setting 'array_parallelism'"),
        ("output_dir='a\ntouch canary #'", "cannot name a folder"),
    ],
)
def test_no_value_becomes_a_line_of_a_jobs_script(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        run(["+exp=debug", SEARCH, BY_SLURM, override], None)
    assert error.value.at


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("setup: [touch canary]\n", "setup"),
        ("teardown: [touch canary]\n", "teardown"),
        ("srun_args: [--multi-prog, canary]\n", "srun_args"),
        ("additional_parameters: {wrap: touch canary}\n", "additional_parameters"),
        ("python: ./canary\n", "python"),
        ("submitit_folder: /tmp/elsewhere\n", "submitit_folder"),
        ("timeout_min: 1;touch canary\n", "timeout_min"),
        ("partition: {x: y}\n", "partition"),
    ],
)
def test_a_hostile_launcher_in_the_place_of_submitits_is_refused(text: str, named: str, tmp_path: Path) -> None:
    folder = tmp_path / "conf/hydra/launcher"
    folder.mkdir(parents=True)
    (folder / "submitit_slurm.yaml").write_text(SLURM_LAUNCHER + text)
    with pytest.raises(ConfigError, match=named) as error:
        run(["+exp=debug", SEARCH, BY_SLURM], tmp_path / "conf")
    assert error.value.at


def test_what_slurm_takes_is_taken() -> None:
    values = {"partition": "'gpu,large'", "account": "lab.a@x", "exclude": "'n[1-3],n5'", "constraint": "'(a|b)&c'"}
    values |= {"gres": "gpu:a100:2", "mem_per_gpu": "40G", "timeout_min": "60", "stderr_to_stdout": "true"}
    values |= {"qos": "null", "name": "my-sweep"}
    line = read_command_line([BY_SLURM, *(f"hydra.launcher.{name}={value}" for name, value in values.items())], [])
    settings = launcher_settings("submitit_slurm", line.settings("hydra.launcher"), [])
    assert settings["constraint"] == "(a|b)&c"
    assert (settings["timeout_min"], settings["stderr_to_stdout"], settings["gres"]) == (60, True, "gpu:a100:2")
    assert "qos" not in settings


@pytest.mark.parametrize(
    "override",
    [
        f"track.group='password={SECRET}'",
        f"track.group='password={SECRET}',plain",
        f"track.tags=[a,'password={SECRET}']",
        f"data.train=https://me:{SECRET}@host/x.jsonl",
        f"engine.deepspeed.vault.password={SECRET}",
        f"engine.deepspeed.vault={{password:{SECRET}}}",
        f"hydra.sweeper.params={{track.group:'password={SECRET},b'}}",
        f"hydra.launcher.name=hf_{SECRET.replace('-', '')}{'aQ7' * 9}",
        f"optimizer.beta2=0.9,0.95,'password={SECRET}'",
        "name=bot-${oc.env:OPENAI_API_KEY}",
        "output_dir=runs/${oc.env:OPENAI_API_KEY}",
        f"hydra.sweeper.storage=sqlite://me:{SECRET}@host/x hydra/launcher=submitit_local",
    ],
)
@pytest.mark.usefixtures("canary")
def test_a_typed_secret_is_refused_and_written_nowhere(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(ConfigError, match=r"holds a secret|database of the trials cannot be used") as error:
        run(["+exp=debug", SEARCH, *override.split(" ")], None)
    assert SECRET not in str(error.value)
    assert error.value.at
    held = [path for path in tmp_path.rglob("*") if SECRET in str(path) or SECRET.encode() in _bytes(path)]
    assert held == []


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
