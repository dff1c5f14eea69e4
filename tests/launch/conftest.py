"""The commands of launch/, run as a person would."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zygote import Zygote

from tunesmith.launch.environment import free_port

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).with_name("scripts.py")
LAUNCHERS = {
    "python": [],
    "deepspeed": ["--num_gpus", "RANKS", "--master_port", "PORT"],
    "torchrun": ["--nproc_per_node", "RANKS", "--master_port", "PORT"],
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
def launch(
    launch_environment: dict[str, str], command: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launch("torchrun", "train", "+exp=debug") runs a script of launch/ in an empty folder and returns its output.

    launch("forked", ...) is "python" in a process that has its imports done: a tenth of a second instead of ten.
    """

    def call(
        launcher: str, script: str, *arguments: str, ranks: int = 2, timeout: int = 240
    ) -> subprocess.CompletedProcess[str]:
        if launcher == "forked":
            said = command(script, tmp_path, *arguments, timeout=timeout)
            return subprocess.CompletedProcess([script, *arguments], said["code"], said["stdout"], said["stderr"])
        values = {"RANKS": str(ranks), "PORT": str(free_port())}
        options = [values.get(option, option) for option in LAUNCHERS[launcher]]
        program = [sys.executable] if launcher == "python" else [str(Path(sys.executable).with_name(launcher))]
        line = [*program, *options, str(ROOT / "launch" / f"{script}.py"), *arguments]
        assert shutil.which(line[0])
        return subprocess.run(
            line, cwd=tmp_path, env=launch_environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return call


@pytest.fixture(scope="session")
def command(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """command("train", root, *arguments, env={...}) runs a script of launch/ in the folder root, in a forked process.

    Its answer: the exit code, stdout, stderr, and the paths below root that it left. Variables of env that are None are
    taken away. It answers yes to whatever asks.
    """
    home = tmp_path_factory.mktemp("home")
    (home / "yes").write_text("yes\n" * 99)

    def tree(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.rglob("*")}

    def call(
        script: str, root: Path, *arguments: str, env: dict[str, str | None] | None = None, timeout: float = 200
    ) -> dict[str, Any]:
        out, err, before = home / "out", home / "err", tree(root)
        for file in (out, err):
            file.unlink(missing_ok=True)
        wanted = zygote.env | (env or {})
        environment = {name: value for name, value in wanted.items() if value is not None}
        said = {"stdin": home / "yes", "stdout": out, "stderr": err}
        task = {"script": script, "arguments": arguments}
        code = zygote.fork(SCRIPTS, "run", task, cwd=root, env=environment, **said).wait(timeout)
        left = sorted(tree(root) - before)
        return {"code": code, "stdout": out.read_text(), "stderr": err.read_text(), "left": left}

    return call
