"""Which variables of this process the ranks get, and a port for them."""

import socket
from collections.abc import Mapping, Sequence

from tunesmith.train.redact import names_a_secret

# What deepspeed exports on the command line of pdsh: EXPORT_ENVS of its runner, and those of CUDA.
ON_COMMAND_LINES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
NEEDED = "PYTHONPATH"  # by deepspeed's own process there, which starts the ranks


def chosen(wanted: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """The variables that cluster.env lists: a name, a prefix such as NCCL_*, or NAME=value. The last one wins."""
    found: dict[str, str] = {}
    for item in wanted:
        name, equals, value = item.partition("=")
        if equals:
            found[name] = value
        elif name.endswith("*"):
            found |= {key: env[key] for key in env if key.startswith(name[:-1])}
        elif name in env:
            found[name] = env[name]
    return found


def without_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """For a launcher that puts variables on command lines: without the ones it would put there, and without secrets."""
    return {name: value for name, value in env.items() if not _would_be_seen(name)}


def _would_be_seen(name: str) -> bool:
    return (name.startswith(ON_COMMAND_LINES) and name != NEEDED) or names_a_secret(name)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
