"""A training on forked ranks: launch/train.py's own main() on each, in about a second."""

import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from zygote import Forked, Zygote

from tunesmith.launch.environment import free_port


@dataclass
class Job:
    """The ranks of one run: how each ended (minus a signal's number), and what they said together."""

    log: Path
    ranks: list[Forked]

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def codes(self) -> dict[int, int]:
        return {rank: forked.code for rank, forked in enumerate(self.ranks) if forked.code is not None}

    def wait(self, timeout: float = 120) -> "Job":
        """Until every rank has ended. Fails when they take longer, and then ends them."""
        deadline = time.monotonic() + timeout
        while self.alive:
            if time.monotonic() > deadline:
                left = self.alive
                self.kill_all()
                pytest.fail(f"ranks {left} did not end within {timeout} s:\n{self.said[-3000:]}")
            time.sleep(0.01)
        return self

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Until something is true of the running ranks. Fails when they end first."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"it never came:\n{self.said[-3000:]}"
            assert not self.codes, f"a rank ended first: {self.codes}\n{self.said[-3000:]}"
            time.sleep(0.01)

    @property
    def alive(self) -> list[int]:
        return [rank for rank, forked in enumerate(self.ranks) if forked.code is None]

    @property
    def seconds_between_ends(self) -> float:
        """From the first rank's end to the last's."""
        ends = [forked.ended_at for forked in self.ranks if forked.ended_at is not None]
        return max(ends) - min(ends)

    def send(self, rank: int, number: signal.Signals) -> None:
        self.ranks[rank].send(number)

    def kill_all(self) -> None:
        for forked in self.ranks:
            forked.send(signal.SIGKILL)
        for forked in self.ranks:
            forked.wait(20)


def start_ranks(
    zygote: Zygote,
    overrides: list[str],
    *,
    cwd: Path,
    world_size: int = 2,
    env: dict[str, str] | None = None,
    limits: dict[int, dict[str, int]] | None = None,
) -> Job:
    """launch/train.py on forked ranks. limits: rank -> {"file_bytes": n} or {"memory_bytes": n}."""
    cwd.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), cwd / f"log-{secrets.token_hex(4)}.txt"
    ranks = []
    for rank in range(world_size):
        mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = zygote.env | {name: str(value) for name, value in mine.items()} | (env or {})
        arguments = {"overrides": overrides, **(limits or {}).get(rank, {})}
        ranks.append(zygote.fork(Path(__file__), "train", arguments, cwd=cwd, stdout=log, env=environment))
    return Job(log, ranks)


def train(overrides: list[str], file_bytes: int = 0, memory_bytes: int = 0) -> None:
    """A rank, with less room than it wants where a test says so."""
    if file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes,) * 2)
    sys.argv = ["launch/train.py", *overrides]
    from tunesmith.launch.arguments import main
    from tunesmith.launch.train import train

    main(train)
