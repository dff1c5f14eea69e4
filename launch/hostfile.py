"""A hostfile as deepspeed reads it: a line `name slots=8` for each host, with the number of its ranks."""

import re
from dataclasses import dataclass
from pathlib import Path

from tunesmith.train.errors import ConfigError

# No brackets and no commas, which pdsh reads as ranges and lists; nothing that a shell or ssh takes for an option.
LINE = re.compile(r"(?P<name>([A-Za-z0-9_.-]+@)?[A-Za-z0-9][A-Za-z0-9_.-]*)\s+slots\s*=\s*(?P<slots>\d+)")
WRITE = "write a line for each host: its name, a blank, and slots=<ranks>, such as `n1 slots=8`."


@dataclass(frozen=True)
class Host:
    """One line."""

    name: str  # as ssh takes it
    slots: int  # ranks
    line: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in the order of the file. Raises ConfigError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{path} cannot be read: {reason}.", key="cluster.hostfile", do=WRITE) from None
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, start=1):
        content = text.partition("#")[0].strip()
        if not content:
            continue
        host = _host(content, path, number)
        if host.name in hosts:
            raise ConfigError(
                f"{host.name} is in the hostfile twice, in line {hosts[host.name].line} too.",
                at=f"{path}:{number}",
                do="keep one line for each host.",
            )
        hosts[host.name] = host
    if not hosts:
        raise ConfigError("the hostfile names no host.", at=str(path), do=WRITE)
    return list(hosts.values())


def _host(content: str, path: Path, number: int) -> Host:
    match = LINE.fullmatch(content)
    if match is None:
        raise ConfigError(f"{content[:100]!r} is not a host.", at=f"{path}:{number}", do=WRITE)
    if int(match["slots"]) < 1:
        raise ConfigError(
            f"{match['name']} has no slots.", at=f"{path}:{number}", do="give it one, or remove the line."
        )
    return Host(match["name"], int(match["slots"]), number)
