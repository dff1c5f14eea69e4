"""What a step costs whatever the machine's mood: a gate on figures that do not depend on it (make step-proxies)."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def proxies(rank: Any, path: str, scratch: str) -> dict[str, Any]:
    """On a rank: what bench/step_proxies.py counts."""
    spec = importlib.util.spec_from_file_location("step_proxies", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["step_proxies"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    counted, error = module.count_step(Path(scratch))
    return {
        "waits": dict(counted.waits),
        "dense_masks": counted.dense_masks,
        "data_passes": counted.data_passes,
        "launches": counted.launches,
        "saved_bytes_error": error,
    }


def test_a_step_waits_once_makes_no_mask_and_reads_its_data_once(ranks: Any, tmp_path: Path) -> None:
    (found,) = ranks(1).run(proxies, path=str(ROOT / "bench/step_proxies.py"), scratch=str(tmp_path))
    (place,) = found["waits"]
    assert found["waits"][place] == 1
    assert place.startswith("tunesmith/train/run/loop.py")
    assert place.endswith("optimizer_step")
    assert found["dense_masks"] == 0
    assert found["data_passes"] == 2  # forwards of the next step, made beside this one
    assert found["saved_bytes_error"] < 0.02
    assert found["launches"] < 1800  # 1,747 on 2026-11-29, of 3 layers, 2 forwards and their update


@pytest.mark.slow
def test_the_command_ends_with_its_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/step_proxies.py")], capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.splitlines()[-1].startswith("step: syncs=1 dense_masks=0 saved_bytes_error=0.0")
