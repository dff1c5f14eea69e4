"""The GPU benches run end to end without a GPU, on tiny shapes: what cannot run is named, and no speed is claimed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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
    assert {"anchored", "chunked", "liger", "cce", "compiled_chunks"} <= found["absent"].keys()
    assert len(found["cases"]) == 15
    for case in found["cases"].values():
        for name in ("ours_torch", "naive"):
            assert case["contestants"][name]["ms"] > 0
            assert max(case["contestants"][name]["errors"].values()) < 2e-6
    assert "absent: liger: it needs CUDA" in printed
    assert len(found["goals"]) == 15


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
