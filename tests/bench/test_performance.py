"""The benches of speed: their pages are those of their JSON, and what they refuse to count."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


@contextmanager
def bench_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    try:
        yield
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    with bench_on_path():
        import growth
    return growth


@pytest.fixture(scope="module")
def gpu_steps() -> ModuleType:
    with bench_on_path():
        import gpu_steps
    return gpu_steps


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    with bench_on_path():
        import scaling_model
    return scaling_model


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    with bench_on_path():
        import cpu_throughput
    return cpu_throughput


def test_the_page_of_performance_is_that_of_the_json(gpu_steps: ModuleType) -> None:
    with bench_on_path():
        import performance_page as page
    parts = [page.read(page.RESULTS / f"{name}.json") for name in ("cpu_throughput", "growth", "gpu_steps")]
    written = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert page.markdown(*parts, gpu_steps.planned_goals()) == written
    if parts[2] is None:  # no GPU has run it
        assert written.count("does not exist yet") == len(gpu_steps.planned_goals())


def test_the_page_of_scaling_has_the_tables_of_its_script(scaling: ModuleType) -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert scaling.with_tables(page) == page


@pytest.mark.parametrize(
    ("stage", "lora", "ranks", "accumulation", "expected"),
    [  # of 8.03e9 parameters, 41.9e6 with LoRA, 1.05e9 in embeddings and head
        (1, False, 8, 4, (8 + 2) * 7 / 8 * 8.03e9),
        (2, False, 8, 4, (4 * 8 + 2) * 7 / 8 * 8.03e9),
        (3, False, 2, 1, (4 + 4) / 2 * 8.03e9),
        (3, True, 2, 1, 4 / 2 * 8.03e9 - 2 / 2 * 1.05e9 + 4 / 2 * 41.9e6),
        (2, True, 1024, 1, 10 * 1023 / 1024 * 41.9e6),
        (2, False, 1, 1, 0),
    ],
)
def test_bytes_on_the_wire(
    scaling: ModuleType, stage: int, lora: bool, ranks: int, accumulation: int, expected: float
) -> None:
    model = next(one for one in scaling.MODELS if one.name == "8B")
    found = scaling.step_bytes(stage, model, ranks, lora=lora, accumulation=accumulation)
    assert found == pytest.approx(expected)


def test_communication_takes_as_long_as_compute_at_the_break_even(scaling: ModuleType) -> None:
    model = next(one for one in scaling.MODELS if one.name == "8B")
    link = scaling.Link("no latency", 100e9, lambda ranks: 0.0)
    tokens = scaling.backward_break_even(2, model, 2, link, lora=False)
    assert tokens * 4 * model.parameters / scaling.FLOPS == pytest.approx(8 / 2 * model.parameters / 100e9)


def test_nothing_grew_faster_than_it_must() -> None:
    """Of the figures in the repository, which the page shows."""
    axes = json.loads((BENCH / "results/growth.json").read_text(encoding="utf-8"))["axes"]
    assert {name: axis["faster_than_it_must"] for name, axis in axes.items()} == {name: [] for name in axes}


def test_exponents_are_fitted_and_held_against_what_must_be(growth: ModuleType) -> None:
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    rows = [{"at": x, "cpu_seconds": x**1.2, "saved_bytes": 7 * x, "needed": 5 * x} for x in (1, 2, 4, 8)]
    assert growth.too_fast("sequence_length", growth.fit(rows)) == ["cpu_seconds"]
    rows = [{"at": x, "cpu_seconds": x, "saved_bytes": x**1.1, "needed": x} for x in (1, 2, 4, 8)]
    assert growth.too_fast("sequence_length", growth.fit(rows)) == ["saved_bytes"]


def test_saved_bytes_count_each_storage_once_and_no_weights(growth: ModuleType) -> None:
    import torch

    layer = torch.nn.Linear(4, 8, bias=False)
    x = torch.ones(16, 4, requires_grad=True)
    with growth.SavedBytes(layer) as saved:
        y = layer(x)  # keeps x and the weight
        (y * y).sum()  # keeps y, twice
    assert saved.total == 4 * (16 * 4 + 16 * 8)


def turns_of(throughput: ModuleType, losses: list[float]) -> list[Any]:
    return [throughput.Sample(1.0, 1.0, 10, losses)]


def test_no_time_counts_where_losses_differ(throughput: ModuleType) -> None:
    names, losses = throughput.CONTESTANTS, [3.0, 2.5, 2.0]
    samples = {name: turns_of(throughput, losses) for name in names}
    assert throughput.check_losses(samples)["losses"] == losses
    for name, off in (("trainer", 2.0001), ("control", 2.0 + 1e-9)):
        with pytest.raises(RuntimeError, match="do not learn the same"):
            throughput.check_losses({**samples, name: turns_of(throughput, [3.0, 2.5, off])})
    flat = {name: turns_of(throughput, [3.0, 3.0]) for name in names}
    with pytest.raises(RuntimeError, match="nothing is learned"):
        throughput.check_losses(flat)


class Fixed:
    """A contestant of gpu_steps.py whose turns are known."""

    def __init__(self, name: str, seconds: list[float], peak: int, losses: list[float]) -> None:
        self.name = name
        self.left = [{"losses": losses, "seconds": one, "peak_bytes": peak} for one in seconds]

    def turn(self, case: Any) -> dict[str, Any]:
        return self.left.pop(0) if self.left else {"failed": "OutOfMemoryError: no more"}


def test_goals_are_of_peers_that_learn_the_same(gpu_steps: ModuleType) -> None:
    case = gpu_steps.CASES[0]
    result = gpu_steps.measure(
        case,
        [
            Fixed("ours", [0.5, 0.4], 60, [9.0, 8.0]),
            Fixed("control", [0.4, 0.41], 60, [9.0, 8.0]),
            Fixed("liger", [0.6, 0.8], 100, [9.0, 8.01]),
            Fixed("plain", [0.1, 0.1], 10, [9.0, 7.0]),
            Fixed("compiled", [], 0, []),
        ],
    )
    assert result["contestants"]["compiled"] == {"failed": "OutOfMemoryError: no more"}
    assert result["contestants"]["control"]["control"] == pytest.approx(1.0)
    assert not result["contestants"]["plain"]["counts"]
    speed, tokens, memory, full = gpu_steps.goals({case.name: result})
    assert (speed.found, speed.verdict) == (pytest.approx(1.5), "met")
    assert (tokens.found, tokens.verdict) == (pytest.approx(8192 / 0.4), "met")
    assert (memory.found, memory.verdict) == (pytest.approx(0.6), "met")
    assert full.verdict == "not measured"


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.timeout(900)  # processes that start one after the other, on a busy machine
def test_whole_steps_run_dry_and_learn_the_same(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    command = [sys.executable, BENCH / "gpu_steps.py", "--device", "cpu", "--tiny", "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert not found["measures"]
    assert len(found["cases"]) == 2
    for case in found["cases"].values():
        counted = {name for name, one in case["contestants"].items() if one.get("counts")}
        assert {"ours", "control", "plain", "trl_head"} <= counted
        assert case["contestants"]["compiled"]["failed"].startswith("ImportError")


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.timeout(900)  # processes that start one after the other, on a busy machine
def test_the_harness_on_the_cpu_ends_with_its_line(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    few = ["--kinds", "tiny-full", "--rounds", "1", "--starts", "1", "--output", output]
    done = subprocess.run(
        [sys.executable, BENCH / "cpu_throughput.py", *few], check=True, capture_output=True, text=True
    )
    closing = done.stdout.splitlines()[-1].split()
    assert closing[0] == "bench:"
    names = ["vs_trainer", "vs_sft_packed", "peak_memory_ratio", "startup_ratio"]
    assert [part.split("=")[0] for part in closing[1:]] == names
    assert list(json.loads(output.read_text(encoding="utf-8"))["closing"]) == names
