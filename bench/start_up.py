"""Seconds from the start of a process to the end of its first optimizer step: ours and the peers', taking turns.

Each process has an empty cache of its own: records are read, tokenised and packed, nothing is left over from before.
The tiny model, full fine-tuning, on conf/data/example. One start of each, not counted, brings the files into memory.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu_setting import KINDS, overrides

BENCH = Path(__file__).parent
FIRST_LINES = {"tunesmith": "step 1/1", "trainer": "first step done", "sft_packed": "first step done"}


def command(name: str, scratch: Path) -> list[str]:
    if name != "tunesmith":
        return [sys.executable, str(BENCH / "cpu_start.py"), name, str(scratch / "trainer")]
    train = BENCH.parent / "launch" / "train.py"
    settings = overrides(KINDS["tiny-full"], scratch, "conf://data/example/train.jsonl", 1)
    return [sys.executable, str(train), *settings, f"output_dir={scratch / 'run'}"]


def one_start(name: str) -> dict[str, float]:
    """Wall and processor seconds until the line that its first step prints. Raises RuntimeError when none comes."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "HF_HOME": folder, "PYTHONUNBUFFERED": "1"}
        started = time.perf_counter()
        process = subprocess.Popen(
            command(name, Path(folder)), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found is None and FIRST_LINES[name] in line:
                found = {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds(process.pid)}
        if process.wait() or found is None:
            errors.seek(0)
            raise RuntimeError(f"{name} made no step:\n{errors.read()[-2000:]}")
        return found


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def measure(num_starts: int) -> dict[str, Any]:
    """Every start, medians, and ours over the faster peer's."""
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in FIRST_LINES}
    for number in range(num_starts + 1):
        for name in list(FIRST_LINES)[:: 1 if number % 2 == 0 else -1]:
            one = one_start(name)
            if number:
                starts[name].append(one)
    medians = {
        unit: {name: statistics.median(one[unit] for one in found) for name, found in starts.items()}
        for unit in ("seconds", "cpu_seconds")
    }
    ratios = {unit: found["tunesmith"] / min(found["trainer"], found["sft_packed"]) for unit, found in medians.items()}
    shown = ", ".join(f"{name} {value:.1f} s" for name, value in medians["seconds"].items())
    print(f"start-up: {shown}", flush=True)
    return {"starts": starts, **medians, "ratio": ratios["seconds"], "cpu_ratio": ratios["cpu_seconds"]}
