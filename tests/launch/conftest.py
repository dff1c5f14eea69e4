"""The commands of launch/, run as a person would."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "python": [],
    "deepspeed": ["--num_gpus", "2", "--master_port"],
    "torchrun": ["--nproc_per_node", "2", "--master_port"],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def launch_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's environment without a GPU, W&B key or cache of their own."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_", "RANK"))}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(home / "cache"),
        "TORCH_EXTENSIONS_DIR": str(home / "torch_extensions"),
    }


@pytest.fixture
def launch(launch_environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launch("torchrun", "train", "+exp=debug") runs a script of launch/ in an empty folder and returns its output."""

    def call(launcher: str, script: str, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
        port = [str(free_port())] if LAUNCHERS[launcher] else []
        program = [sys.executable] if launcher == "python" else [str(Path(sys.executable).with_name(launcher))]
        command = [*program, *LAUNCHERS[launcher], *port, str(ROOT / "launch" / f"{script}.py"), *arguments]
        assert shutil.which(command[0])
        return subprocess.run(
            command, cwd=tmp_path, env=launch_environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return call
