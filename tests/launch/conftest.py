"""The commands of launch/, run as a person would."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.launch.environment import free_port

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "python": [],
    "deepspeed": ["--num_gpus", "2", "--master_port"],
    "torchrun": ["--nproc_per_node", "2", "--master_port"],
}


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


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """command("train", root, *arguments, env={...}) runs a script of launch/ in the folder root; see commands.py."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_", "RANK"))}
    ours = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    folders = {"TORCH_EXTENSIONS_DIR": str(home / "extensions"), "HF_HOME": str(home / "hf")}
    log = (home / "log").open("w")
    program = [sys.executable, str(Path(__file__).parent / "commands.py")]
    server = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=kept | ours | folders
    )

    def call(script: str, root: Path, *arguments: str, env: dict[str, str | None] | None = None) -> dict[str, Any]:
        assert server.stdin is not None
        assert server.stdout is not None
        task = {"script": script, "arguments": arguments, "root": str(root), "env": env or {}}
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        assert line, (home / "log").read_text()
        return json.loads(line)

    with log, server:
        yield call
        assert server.stdin is not None
        server.stdin.close()
