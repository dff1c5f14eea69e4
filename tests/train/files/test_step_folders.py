"""Which checkpoints are there, also for those who start runs and import no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.train.files.step_folders import newest_checkpoint


def test_a_checkpoint_without_its_manifest_is_no_progress(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-000007").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 0
    for name in ("step-000005", ".staged-step-000009", "step-000008.bad"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "MANIFEST.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == 5


@pytest.mark.parametrize("name", ["launch.supervise", "launch.cluster.job", "launch.cluster.status"])
def test_who_starts_runs_imports_no_torch(name: str) -> None:
    code = f"import sys, tunesmith.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60, check=False).returncode == 0
