"""Runs SLURM's own programs: squeue, scancel, scontrol, sbatch."""

import subprocess
from collections.abc import Mapping, Sequence

from tunesmith.train.errors import ConfigError

ON_A_LOGIN_NODE = "run this on a login node of the cluster."


def run_program(
    command: Sequence[str], env: Mapping[str, str], seconds: float, *, do: str = ON_A_LOGIN_NODE
) -> subprocess.CompletedProcess[str]:
    """Its output in English, whatever its exit code.

    Raises: ConfigError, with the remedy `do`, where it is not installed; subprocess.TimeoutExpired after the seconds.
    """
    try:
        return subprocess.run(
            list(command),
            env={**env, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigError(f"there is no program {command[0]!r} on this machine.", at="PATH", do=do) from None
