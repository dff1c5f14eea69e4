"""Run folders of jobs, as launch/slurm.py, the driver and the run write them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(job={"job_id": "12"}, events=[...], steps=20, total_steps=60) is a run folder."""

    def make(
        *,
        job: dict[str, Any] | None = None,
        events: list[dict[str, Any]] | None = None,
        steps: int = 0,
        total_steps: int | None = None,
        summary: dict[str, Any] | None = None,
        checkpoint: int | None = None,
        max_restarts: int = 100,
    ) -> Path:
        run = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        (run / "job").mkdir(parents=True)
        (run / "config.yaml").write_text(f"cluster:\n  max_restarts: {max_restarts}\n")
        if job is not None:
            (run / "job/job.json").write_text(json.dumps({"submitted": time.time() - 600, **job}))
            lines = [
                json.dumps({"time": time.time() - 300 + number, "job_id": (job or {}).get("job_id"), **event})
                for number, event in enumerate(events or [])
            ]
            (run / "job/events.jsonl").write_text("".join(f"{line}\n" for line in lines))
        rows = [
            {
                "step": step,
                "seconds": step * 0.5,
                "train/loss": 5 - step / 100,
                "throughput/step_seconds": 0.5,
                "throughput/tokens_per_second": 12345.6,
            }
            for step in range(1, steps + 1)
        ]
        if rows:
            (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if total_steps is not None:
            (run / "plan.json").write_text(json.dumps({"total_steps": total_steps}))
        if summary is not None:
            (run / "summary.json").write_text(json.dumps(summary))
        if checkpoint is not None:
            folder = run / f"checkpoints/step-{checkpoint:06d}"
            folder.mkdir(parents=True)
            (folder / "MANIFEST.json").write_text("{}")
        return run

    return make
