"""What only a GPU can show: the CUDA path of a whole run, in each precision, and its resumption."""

import json

import orjson
import pytest

QUICK = (
    "+exp=debug",
    "schedule.max_steps=6",
    "checkpoint.every_steps=2",
    "evaluate.every_steps=3",
    "cluster.device=cuda",
)


def losses(path) -> list[float]:
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_run_has_the_losses_of_a_cpu_run(precision, engine, launch, launch_environment, monkeypatch, tmp_path):
    monkeypatch.delitem(launch_environment, "CUDA_VISIBLE_DEVICES")
    here = launch("python", "train", *QUICK, f"engine={engine}", f"engine.precision={precision}", "output_dir=gpu")
    assert here.returncode == 0, here.stderr[-3000:]
    assert launch("python", "train", *QUICK, "cluster.device=cpu", "output_dir=cpu").returncode == 0
    tolerance = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}[precision]  # rounding of the weights after six updates
    assert losses(tmp_path / "gpu/metrics.jsonl") == pytest.approx(
        losses(tmp_path / "cpu/metrics.jsonl"), rel=tolerance
    )
    assert json.loads((tmp_path / "gpu/summary.json").read_text())["status"] == "finished"
