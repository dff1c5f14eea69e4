"""The file in which timed picks are kept, and the machine that they are kept for."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def machine(device: torch.device) -> dict[str, str]:
    """What a pick depends on besides the workload."""
    on_gpu = device.type == "cuda"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none, the interpreter",
        "driver": driver_version() if on_gpu else "none",
        "torch": torch.__version__,
        "triton": triton,
        "kernels": _source_digest(),
    }


def driver_version() -> str:
    """Of NVIDIA's driver; unknown where neither the kernel module nor nvidia-smi tells."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", text):
            return found[1]
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    return "unknown"


def _source_digest() -> str:
    """Of all kernels' code: a pick does not outlive a change of it."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_file() -> Path:
    """Where picks are kept, for all runs of this user."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path("~/.cache").expanduser()) / "tunesmith" / "picks.json"


def read(cache: Path, check: Callable[[Any], object]) -> dict[str, dict[str, Any]]:
    """What is kept, by machine and workload; nothing, and a warning, where check() cannot read the file."""
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            return {}
        for picks in kept["machines"].values():
            for given in picks.values():
                check(given)
        return kept["machines"]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{cache} holds no timed picks ({type(error).__name__}): it is written anew.", stacklevel=4)
        return {}


def write(cache: Path, key: str, picks: dict[str, Any], check: Callable[[Any], object]) -> None:
    """Adds to the file, in one step; where it cannot be written, a warning says so, and the next run picks again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was read first
        kept = read(cache, check)
    kept.setdefault(key, {}).update(picks)
    try:
        cache.parent.mkdir(0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False, encoding="utf-8") as file:
            json.dump({"format": FORMAT, "machines": kept}, file, indent=1)
        os.replace(file.name, cache)
    except OSError as error:
        warnings.warn(f"timed picks cannot be kept in {cache}: {error}", stacklevel=4)
