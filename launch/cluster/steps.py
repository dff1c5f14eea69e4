"""The commands of a job: srun with one task per node for the pre-flight, and one per rank for the training."""

import subprocess
import sys
from pathlib import Path

from tunesmith.launch.cluster.job_spec import JobSpec
from tunesmith.train.config.override_text import quoted

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
CODE = TRAIN.parents[1]


def on_each_node(spec: JobSpec, command: list[str]) -> list[str]:
    """A task of one CPU on each node, beside whatever else runs there."""
    spread = [f"--nodes={spec.nodes}", f"--ntasks={spec.nodes}", "--ntasks-per-node=1", "--cpus-per-task=1"]
    return ["srun", "--overlap", "--export=ALL", "--input=none", "--cpu-bind=none", *spread, *command]


def on_node(node: str, command: list[str]) -> list[str]:
    """One task on one node of the job."""
    return ["srun", "--overlap", "--input=none", "--nodes=1", "--ntasks=1", f"--nodelist={node}", *command]


def training(spec: JobSpec, restart: int, overrides: list[str]) -> list[str]:
    """A task for each rank, each with a log of its own. When one dies srun ends the others."""
    logs = str(spec.log_dir(restart)).replace("%", "%%")
    options = [
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--input=none",
        f"--nodes={spec.nodes}",
        f"--ntasks={spec.world_size}",
        f"--ntasks-per-node={spec.ranks_per_node}",
        f"--cpu-bind={spec.cpu_bind}",
        f"--output={logs}/rank-%5t.log",
    ]
    if spec.gpus_per_node:  # all GPUs of the node for each of its ranks: NCCL wants to see the peers
        options.append(f"--gpus-per-node={spec.gpus_per_node}")
    if spec.cpus_per_task:  # since 22.05 srun does not inherit it from sbatch
        options.append(f"--cpus-per-task={spec.cpus_per_task}")
    return [
        "srun",
        *options,
        *in_container(spec, [*_train(spec), *overrides, f"output_dir={quoted(str(spec.run_dir))}"]),
    ]


def _train(spec: JobSpec) -> list[str]:
    python = spec.container_python if spec.container else sys.executable
    own = [f"--config-dir={spec.config_dir}"] if spec.config_dir else []
    return [python, str(TRAIN), *own]


def in_container(spec: JobSpec, command: list[str]) -> list[str]:
    """The command inside the image, which sees the code, the run's folder and the mounts."""
    if not spec.container:
        return command
    folders = [str(CODE), str(spec.run_dir), *([str(spec.config_dir)] if spec.config_dir else [])]
    mounts = [*(f"{folder}:{folder}" for folder in folders), *spec.container_mounts]
    if spec.container_runtime == "enroot":  # srun's own options, of the pyxis plugin
        return [f"--container-image={spec.container}", f"--container-mounts={','.join(mounts)}", *command]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *(["--nv"] if spec.gpus_per_node else []), *binds, spec.container, *command]


def output_of(command: list[str], seconds: float) -> str:
    """The output of a short step; its errors go to the job's log."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else ""
    return done.stdout
