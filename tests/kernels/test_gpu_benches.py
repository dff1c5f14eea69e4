"""The GPU benches run end to end without a GPU, on tiny shapes: what cannot run is named, and no speed is claimed."""

import json
import os
import runpy  # noqa: TID251 - of files in bench/
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from matrices import covered

BENCH = Path(__file__).parents[2] / "bench"


def run(name: str, tmp_path: Path, *extra: str, interpreted: bool = False) -> tuple[dict, str]:
    """The JSON and what was printed."""
    output = tmp_path / "folder" / "result.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    command = [sys.executable, BENCH / f"{name}.py", "--device", "cpu", "--tiny", "--output", output, *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert json.loads((tmp_path / f"{name}.json").read_text()) == found
    assert found["measures"] is False
    assert {goal["verdict"] for goal in found["goals"]} <= {"not measured"}
    return found, done.stdout


@pytest.mark.slow
def test_the_bench_of_the_loss_checks_and_times_what_can_run_here(tmp_path):
    found, printed = run("gpu_loss", tmp_path)
    assert {"anchored", "chunked", "liger", "liger_cute", "quack", "cce", "compiled_chunks"} <= found["absent"].keys()
    assert len(found["cases"]) == 15
    for case in found["cases"].values():
        for name in ("ours_torch", "naive"):
            assert case["contestants"][name]["ms"] > 0
            assert max(case["contestants"][name]["errors"].values()) < 2e-6
    assert "absent: liger: it needs CUDA" in printed
    assert len(found["goals"]) == 15


@pytest.mark.parametrize("name", ["liger_cute", "quack"])
def test_a_contestant_that_is_not_installed_is_absent_by_name(name):
    """Those of CuTe need packages that no extra of ours installs; on a GPU without them that is what is said."""
    bench = runpy.run_path(str(BENCH / "gpu_loss_contestants.py"))
    package = {"liger_cute": "liger_kernel.ops.cutedsl", "quack": "quack"}[name]
    with patch.dict(sys.modules, {package: None}), pytest.raises(ImportError, match=package.split(".")[0]):
        bench[f"_{name}"](torch.device("cuda"))
    assert "it needs CUDA" in bench["contestants"](torch.device("cpu"))[1][name]


def test_our_speed_is_also_held_against_the_strongest_of_all(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    bench = runpy.run_path(str(BENCH / "gpu_loss.py"))
    times = {name: {"ms": ms} for name, ms in {"limit": 20, "anchored": 25, "liger": 40, "quack": 24}.items()}
    found = bench["_ratios"]("anchored", times, {"anchored": 4, "liger": 8, "quack": 6})
    assert (found["best_rival"], found["speed"], found["memory"]) == ("liger", 40 / 25, 4 / 8)
    assert (found["strongest"], found["over_all"]) == ("quack", 24 / 25)


@pytest.mark.slow
def test_a_budget_cuts_the_last_cases_and_names_them(tmp_path):
    found, printed = run("gpu_loss", tmp_path, "--seconds", "0")
    assert len(found["cases"]) == 1
    assert found["cut"][-1] == "1B T=8192 kept=35% trained"
    assert "cut for time: 8B T=8192 kept=35% frozen, " in printed


@pytest.mark.slow
def test_the_bench_of_lora_checks_and_times_what_can_run_here(tmp_path):
    found, _ = run("gpu_lora", tmp_path)
    assert found["absent"].keys() == {"ours", "peft_compiled"}
    assert len(found["cases"]) == 8
    for name, case in found["cases"].items():
        for contestant in ("ours_torch", "base_first", "peft"):
            result = case["contestants"][contestant]
            assert result["ms"] > 0
            assert (result["errors"]["largest"] or 0) < 2e-6, (name, contestant)


@pytest.mark.slow
def test_the_probe_runs_every_item_under_the_interpreter(tmp_path):
    found, _ = run("gpu_probe", tmp_path, interpreted=True)
    items = {row["item"].split()[0] for row in found["rows"]}
    assert items == set("012345")
    assert found["absent"] == {}
    errors = [float(row["note"].split()[1]) for row in found["rows"] if row["note"].startswith("error")]
    assert len(errors) == 9
    assert max(errors) < 2e-6


@pytest.mark.parametrize("name", covered(["gpu_loss", "gpu_lora", "gpu_probe"], []))
def test_without_a_gpu_a_bench_refuses_to_measure(name):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for options, words in (([], "there is no GPU here"), (["--device", "cpu"], "measures nothing")):
        done = subprocess.run(
            [sys.executable, BENCH / f"{name}.py", *options],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 2
        assert words in done.stderr
