"""How ranks on other machines get their arguments and variables: from a file that only their user can read.

    python launch/train.py --start <file>

On a command line everyone on those machines could see both, and a shell there would read them. launch/hosts.py writes
the file into the run folder, and removes it as soon as every rank has reported that it has read it.
"""

import base64
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.train.errors import ConfigError
from tunesmith.train.watch.node_facts import node_name

FOLDER = ".tunesmith-start-"  # a run folder with nothing but this does not count as used
FILE = "start.json"
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")  # what the shell on the other machine leaves as it is
ENCODED = "base64:"
WAIT_SECONDS = 15.0  # that a network file system may need to show it
BEFORE_PYTHON = ("LD_", "PYTHON")  # what is read before a program's first line runs
RESTARTED = "TUNESMITH_STARTED_ANEW"


@dataclass(frozen=True)
class RankProcess:
    """A rank that has read its start file."""

    node: str
    node_rank: int
    pid: int


def write(run_dir: Path, arguments: Sequence[str], env: Mapping[str, str]) -> Path:
    """Writes the file, and returns its path."""
    folder = run_dir / f"{FOLDER}{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700, parents=True)
    path = folder / FILE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"arguments": list(arguments), "env": dict(env)}, file)
        file.flush()
        os.fsync(file.fileno())
    return path


def as_word(path: Path) -> str:
    """The path for a command line that a shell on another machine reads, which deepspeed does not quote for it."""
    text = str(path)
    return text if PLAIN.fullmatch(text) else ENCODED + base64.urlsafe_b64encode(os.fsencode(text)).decode()


def from_word(word: str) -> Path:
    """What as_word() was given."""
    if not word.startswith(ENCODED):
        return Path(word)
    return Path(os.fsdecode(base64.urlsafe_b64decode(word.removeprefix(ENCODED))))


def ranks_of(path: Path) -> dict[int, RankProcess]:
    """The ranks that have read the file."""
    found = {}
    for file in path.parent.glob("rank-*.json"):
        try:
            found[int(file.stem.removeprefix("rank-"))] = RankProcess(**json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
    return found


def take(path: Path) -> list[str]:
    """In a rank: sets the variables, reports that it has read them, and returns the arguments. Raises ConfigError."""
    tree = _read(path)
    changes = {name: value for name, value in tree["env"].items() if os.environ.get(name) != value}
    os.environ.update(changes)
    if RESTARTED not in os.environ and any(name.startswith(BEFORE_PYTHON) for name in changes):
        os.environ[RESTARTED] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    rank = int(os.environ.get("RANK", "0"))
    mine = RankProcess(node_name(), int(os.environ.get("CROSS_RANK", "0")), os.getpid())
    staged = path.parent / f".rank-{rank}"
    staged.write_text(json.dumps(vars(mine)), encoding="utf-8")
    staged.replace(path.parent / f"rank-{rank}.json")
    return [str(argument) for argument in tree["arguments"]]


def _read(path: Path) -> dict[str, dict[str, str]]:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{node_name()} does not see the file that launch/hosts.py has written.",
                at=f"--start {path}",
                do="choose an output_dir that all hosts share; if they do share it, that start has ended: start again.",
            )
        time.sleep(0.1)
    info = path.stat()
    if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(
            "others could have written the arguments of this rank.",
            at=f"--start {path}",
            do="choose an output_dir on a file system that keeps owners and permissions.",
        )
    return json.loads(path.read_text(encoding="utf-8"))
