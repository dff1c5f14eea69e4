"""Versions that nobody has tried are proven before the first run with them, by every launcher, and not again."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

QUICK = ("+exp=debug", "schedule.max_steps=1", "evaluate.generate=false", "data.cache_dir=cache", "data.validation=[]")
QUICK += ("batch.sequence_length=256", "data.truncate=drop", "evaluate.every_steps=null")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed", "torchrun"])
def test_the_first_start_checks_the_gradients_and_trains(
    launcher: str,
    launch: Callable[..., subprocess.CompletedProcess[str]],
    launch_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    told = tmp_path / "site/deepspeed-9.9.dist-info"  # what is asked for a version; the code is the one installed
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.9\n", encoding="utf-8")
    monkeypatch.setitem(launch_environment, "PYTHONPATH", str(told.parent))
    for number in range(2):
        done = launch(launcher, "train", *QUICK, f"output_dir=run-{number}")
        assert done.returncode == 0, done.stderr[-3000:]
        said = "checking the gradients of deepspeed 9.9, torch " in done.stdout
        assert said == (number == 0)
    (kept,) = (tmp_path / "cache/engine_checks").iterdir()
    assert '"deepspeed": "9.9"' in kept.read_text(encoding="utf-8")
    assert "engine: max_grad_rel_err=" in kept.read_text(encoding="utf-8")
