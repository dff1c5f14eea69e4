"""Whole runs on forked ranks, and the table of what became of each fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_ranks import Job, start_ranks
from zygote import Zygote

NUM_STEPS = 12
EVERY_STEPS = 3  # between two saves


@pytest.fixture(scope="session")
def tiny_run(make_model: Callable[..., Path], make_records: Callable[..., Path], data_cache: Path) -> list[str]:
    """Overrides of a run of twelve steps with dropout and two forwards a step on two ranks, saved every three."""
    return [
        f"model.name_or_path={make_model(attention_dropout=0.1)}",
        f"data.train={make_records(47)}",
        f"data.cache_dir={data_cache}",
        "adapter=lora",
        "adapter.dropout=0.1",
        "engine=zero2",
        "engine.precision=fp32",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=2",
        "batch.sequence_length=96",
        "schedule=cosine",
        "schedule.epochs=null",
        f"schedule.max_steps={NUM_STEPS}",
        "optimizer.learning_rate=3e-3",
        f"checkpoint.every_steps={EVERY_STEPS}",
        "evaluate.generate=false",
        "track=none",
        "cluster.device=cpu",
        "output_dir=run",
    ]


Start = Callable[..., Job]


@pytest.fixture
def start(zygote: Zygote, tiny_run: list[str], tmp_path: Path) -> Start:
    """start("engine=zero3", faults="kill:rank=1,step=4") begins the tiny run in tmp_path/run, or goes on with it."""

    def begin(*overrides: str, faults: str = "", env: dict[str, str] | None = None, **rest: Any) -> Job:
        extra = ({"TUNESMITH_FAULTS": faults} if faults else {}) | (env or {})
        return start_ranks(zygote, [*tiny_run, *overrides], cwd=tmp_path, env=extra, **rest)

    return begin


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], dict[int, float]]:
    """losses(run_dir) is step -> loss, from metrics.jsonl; a last row that was cut short is left out."""

    def of(run_dir: Path) -> dict[int, float]:
        path = run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        rows = [row for row in map(json.loads, lines) if "train/loss" in row]
        return {row["step"]: row["train/loss"] for row in rows}

    return of


@pytest.fixture(scope="session")
def trained() -> Callable[[Path], bytes]:
    """trained(run_dir) is the bytes of the model that a run has left behind."""

    def of(run_dir: Path) -> bytes:
        return b"".join(path.read_bytes() for path in sorted((run_dir / "model").glob("*.safetensors")))

    return of


@pytest.fixture(scope="session")
def published() -> Callable[[Path], list[int]]:
    """published(run_dir) is the steps of its checkpoints, as their folders' names say; not by Tunesmith's own code."""

    def of(run_dir: Path) -> list[int]:
        manifests = (run_dir / "checkpoints").glob("step-*/MANIFEST.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests if "." not in path.parent.name)

    return of


@pytest.fixture(scope="session")
def left_alone(zygote: Zygote, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """left_alone("engine=zero3") is the folder of the tiny run that nothing happened to."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            cwd = tmp_path_factory.mktemp("left-alone")
            job = start_ranks(zygote, [*tiny_run, *overrides], cwd=cwd).wait()
            assert job.codes == {0: 0, 1: 0}, job.said[-3000:]
            made[overrides] = cwd / "run"
        return made[overrides]

    return run
