"""The engine has the gradients of one process in float64, and a start with versions nobody tried makes sure of it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.distributed import World
from tunesmith.train.run import engine_check, versions_check
from tunesmith.train.track.reporter import Reporter

CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"
STAGES = [0, 1, 2, 3]
LEFT_OUT, NORM, APART = "a rank is left out", "the norm is another", "ranks part"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    engine_check.write_models(folder)
    return str(folder)


def problems(rank: Any, folder: str, indices: list[int], fault: str = "") -> list[str]:
    """On every rank: what is wrong with some of the quick combinations, with a fault in the engine."""
    from dataclasses import replace

    from tunesmith.train.engine import Engine

    backward, step = Engine.backward, Engine.step

    def without_rank_1(engine: Engine, loss: torch.Tensor) -> None:
        backward(engine, loss * (1 - rank.world.rank))

    def other_norm(engine: Engine) -> Any:
        update = step(engine)
        return replace(update, norm=update.norm / 2)

    def apart(engine: Engine) -> Any:
        update = step(engine)
        with torch.no_grad():
            next(engine.module.parameters()).view(-1)[0] += 1e-6 * rank.world.rank
        return update

    faults = {LEFT_OUT: ("backward", without_rank_1), NORM: ("step", other_norm), APART: ("step", apart)}
    if fault:
        setattr(Engine, *faults[fault])
    try:
        chosen = [engine_check.QUICK[index] for index in indices]
        return [engine_check.check(combination, Path(folder), rank.world).problem for combination in chosen]
    finally:
        Engine.backward, Engine.step = backward, step  # type: ignore[method-assign]


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norm_and_weights_are_right_in_the_quick_combinations(
    ranks: Callable[[int], Any], models: str, stage: int
) -> None:
    indices = [index for index, combination in enumerate(engine_check.QUICK) if combination.stage == stage]
    assert ranks(2).run(problems, folder=models, indices=indices) == [[""] * len(indices)] * 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (LEFT_OUT, "the gradient is off by "),
        (NORM, "the norm is said to be 1.106 of a gradient of 2.212"),
        (APART, "the ranks have other parameters after the same step"),
    ],
)
def test_a_fault_in_the_engine_is_found(ranks: Callable[[int], Any], models: str, fault: str, said: str) -> None:
    for (problem,) in ranks(2).run(problems, folder=models, indices=[1], fault=fault):
        assert problem.startswith(said)


def test_the_quick_combinations_meet_every_setting_with_every_stage() -> None:
    for setting in ("accumulation", "precision", "adapter", "reuse"):
        for stage in STAGES if setting != "reuse" else (2,):
            met = {getattr(it, setting) for it in engine_check.QUICK if it.stage == stage}
            assert met == {getattr(it, setting) for it in engine_check.ALL}, (setting, stage)
    assert set(engine_check.QUICK) < set(engine_check.ALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_combination_is_right() -> None:
    command = [sys.executable, "-P", "-m", engine_check.__name__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("engine: max_grad_rel_err=")
    assert last.endswith(f" combinations={4 * 2 * 3 * 2 * 2}")


# ---------------------------------------------------------------- at the start of a run


def start(tmp_path: Path, *overrides: str) -> None:
    """What a run does about its versions."""
    run = ["model=tiny", "data.train=none.jsonl", f"data.cache_dir={tmp_path}", *overrides]
    versions_check.check_versions(compose_config(run).config, World(), torch.device("cpu"), Reporter(None))


def check_that_ends(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Versions nobody tried, and a check that is this program."""
    monkeypatch.setattr(versions_check, "TRIED", ({"deepspeed": "0.1", "torch": "0.2", "transformers": "0.3"},))
    monkeypatch.setattr(versions_check, "COMMAND", [sys.executable, "-c", program])


def test_what_constraints_pin_was_tried_and_needs_no_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pins[name] for name in versions_check.TRIED[-1]} == versions_check.TRIED[-1]
    monkeypatch.setattr(versions_check, "COMMAND", ["/no/such/program"])
    monkeypatch.setattr(versions_check, "installed", lambda: versions_check.TRIED[0])
    start(tmp_path)


def test_a_wrong_gradient_is_refused_with_versions_place_and_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = engine_check.Finding(engine_check.QUICK[4], 0.72, 1.547, 2.154, True)
    check_that_ends(monkeypatch, f"print({str(wrong)!r}); print('engine: x'); raise SystemExit({engine_check.WRONG})")
    for _ in range(2):  # a pass would be kept, a failure is not
        with pytest.raises(TrainingError) as caught:
            start(tmp_path)
        for name, version in versions_check.installed().items():
            assert f"{name} {version}" in caught.value.what
        assert "they compute a wrong gradient: ZeRO 2, accumulation 4, weights used once, fp32" in caught.value.what
        assert "off by 0.72 of its size (norm 1.547 for 2.154)" in caught.value.what
        assert caught.value.do is not None
        assert "to see why" not in caught.value.do
        assert "pip install deepspeed==0.1 torch==0.2 transformers==0.3" in caught.value.do
    start(tmp_path, "engine.check_versions=false")


def test_a_check_that_fails_is_no_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_that_ends(monkeypatch, "import no_such_module")
    with pytest.raises(TrainingError, match="failed: ModuleNotFoundError: No module named 'no_such_module'") as caught:
        start(tmp_path)
    assert caught.value.do is not None
    assert caught.value.do.startswith(f"run {sys.executable} -c 'import no_such_module' to see why, and mend that; or ")
    check_that_ends(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(versions_check, "MOST_SECONDS", 0.1)
    with pytest.raises(TrainingError, match=r"was not done in 0.1 s"):
        start(tmp_path)


def test_a_pass_is_kept_for_these_versions_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); print('engine: max_grad_rel_err=0 combinations=10')"
    check_that_ends(monkeypatch, count)
    start(tmp_path)
    start(tmp_path)
    assert (tmp_path / "runs").read_text() == "x"
    monkeypatch.setattr(versions_check, "versions", lambda: {"deepspeed": "0.20.0"})
    start(tmp_path)
    assert (tmp_path / "runs").read_text() == "xx"


# ---------------------------------------------------------------- DeepSpeed as it was

# Keys that 0.18.2 does not know, and whose values are what it does: with them it refuses our config at once.
WITHOUT_NEW_KEYS = """
import sys
from tunesmith.train.run import engine_check
from tunesmith.train.zero import deepspeed_config

ours = deepspeed_config._owned

def older(config, world_size):
    tree = ours(config, world_size)
    tree["bf16"] = {"enabled": tree["bf16"]["enabled"]}
    del tree["fp16"]["fp16_master_weights_and_grads"], tree["zero_optimization"]["compute_grad_norm"]
    return tree

deepspeed_config._owned = older
sys.exit(engine_check.main(sys.argv[1:]))
"""
START = """
import sys
from pathlib import Path
sys.path[0:0] = [sys.argv[1]]
import test_engine_check
from tunesmith.train.errors import TrainingError
from tunesmith.train.run import versions_check
if len(sys.argv) > 3:
    versions_check.COMMAND = [sys.executable, "-c", sys.argv[3], "--quick"]
try:
    test_engine_check.start(Path(sys.argv[2]))
except TrainingError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def deepspeed_0_18_2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the release that gave ZeRO 2 a part of the gradient."""
    folder = str(tmp_path_factory.mktemp("deepspeed"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", folder]
    command = [sys.executable, "-m", "pip", "install", *options, "deepspeed==0.18.2"]
    if subprocess.run(command, capture_output=True, timeout=200, check=False).returncode:
        pytest.skip("pip cannot fetch deepspeed 0.18.2")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_start_with_deepspeed_0_18_2_is_refused_for_its_gradients(
    deepspeed_0_18_2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", deepspeed_0_18_2)
    own = [sys.executable, "-c", START, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*own, WITHOUT_NEW_KEYS], capture_output=True, text=True, check=False)
    assert "TrainingError: deepspeed 0.18.2, torch " in done.stdout, done.stderr
    assert "they compute a wrong gradient: ZeRO 2, accumulation 4, " in done.stdout
    assert "the gradient is off by 0.7" in done.stdout
    done = subprocess.run(own, capture_output=True, text=True, check=False)  # as it is: its config has fewer keys
    assert "the check of their gradients failed: ConfigError: DeepSpeed refuses " in done.stdout
