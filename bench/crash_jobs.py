"""Runs of two ranks that are killed, watched and judged from outside."""

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash_setting import ACCUMULATION, CHECKPOINTS, NUM_STEPS, WORLD_SIZE, read_trace

HERE = Path(__file__).parent
ROUND_SECONDS = 0.1  # torchrun looks at its ranks so often
GRACE_SECONDS = 30.0  # torchrun kills what a SIGTERM has not ended after so long
HANG_SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(scratch: Path) -> dict[str, str]:
    """Of every process here: no GPU, no network, one thread, and build folders of this measurement's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_", "RANK"))}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(scratch / "torch_extensions"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@dataclass(frozen=True)
class Arm:
    """Count the file operations of a save on a rank, and kill it at one of them (0: at none)."""

    begin: str  # in the path of the first operation that counts
    end: str  # in the path of the first that no longer does; empty: all count
    kill_at: int = 0


@dataclass
class Ended:
    """How a run went: exit code of each rank (minus a signal's number; None: ended by us), words, trace."""

    codes: list[int | None]
    said: str
    trace: list[list[dict[str, Any]]]
    seconds: float
    hung: bool
    operations: list[Path] = field(default_factory=list)


class Side:
    """A process that forks the ranks of one side."""

    def __init__(self, name: str, setting: Path, stage: int, scratch: Path, shim: Path) -> None:
        self.name, self.setting, self.stage, self.scratch = name, setting, stage, scratch
        self._env = environment(scratch)
        self._log = (scratch / f"{name}-ranks.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "crash_ranks.py"), name],
            env=self._env | {"LD_PRELOAD": str(shim)},
            cwd=scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._waiting = b""

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _news(self, seconds: float) -> list[dict[str, Any]]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return []
        read = os.read(self._process.stdout.fileno(), 1 << 16)
        if not read:
            raise RuntimeError(f"the ranks of {self.name} cannot be forked: {self.scratch}/{self.name}-ranks.log")
        *lines, self._waiting = (self._waiting + read).split(b"\n")
        return [json.loads(line) for line in lines]

    def run(
        self,
        folder: Path,
        *,
        arms: dict[int, Arm] | None = None,
        file_bytes: dict[int, int] | None = None,
        to_the_end: bool = False,
    ) -> Ended:
        """One run in a folder, watched as torchrun does: when a rank fails the others are ended.

        It is over when its ranks have ended or, unless to_the_end, when each has done the forwards of the last step.
        """
        folder.mkdir(parents=True, exist_ok=True)
        mark, started = secrets.token_hex(4), time.monotonic()
        trace, log = folder / f"trace-{mark}", folder / f"log-{mark}.txt"
        operations = [folder / f"operations-{mark}.{rank}" for rank in range(WORLD_SIZE)]
        port, ids = free_port(), {}
        assert self._process.stdin is not None
        for rank in range(WORLD_SIZE):
            arm = (arms or {}).get(rank)
            prefix = str(folder / CHECKPOINTS)
            task = {
                "id": secrets.token_hex(8),
                "setting": str(self.setting),
                "stage": self.stage,
                "trace": str(trace),
                "env": self._env | rank_environment(rank, port),
                "cwd": str(folder),
                "log": str(log),
                "file_bytes": (file_bytes or {}).get(rank),
                "arm": [prefix, arm.begin, arm.end, arm.kill_at, str(operations[rank])] if arm else None,
            }
            ids[task["id"]] = rank
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        codes, hung = self._watch(ids, trace, to_the_end)
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return Ended(codes, said, read_trace(trace), time.monotonic() - started, hung, operations)

    def _watch(self, ids: dict[str, int], trace: Path, to_the_end: bool) -> tuple[list[int | None], bool]:
        pids: dict[int, int] = {}
        codes: dict[int, int] = {}
        deadline, failed_at, hung, stopped = time.monotonic() + HANG_SECONDS, None, False, False
        while len(codes) < WORLD_SIZE:
            for news in self._news(ROUND_SECONDS):
                rank = ids[news["id"]]
                if "pid" in news:
                    pids[rank] = news["pid"]
                else:
                    codes[rank] = news["code"]
            alive = [pid for rank, pid in pids.items() if rank not in codes]
            now = time.monotonic()
            if stopped or now > deadline or (failed_at is not None and now > failed_at + GRACE_SECONDS):
                hung = hung or now > deadline
                send(alive, signal.SIGKILL)
            elif failed_at is None and any(codes.values()):
                failed_at = now
                send(alive, signal.SIGTERM)
            elif not to_the_end and not codes and is_done(trace):
                stopped = True
                send(alive, signal.SIGKILL)
        return [None if stopped else codes[rank] for rank in range(WORLD_SIZE)], hung


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it has ended by itself


def is_done(trace: Path) -> bool:
    return is_done_in(read_trace(trace))


def is_done_in(rows: list[list[dict[str, Any]]]) -> bool:
    """Whether every rank has done the last forward of the last step."""
    return all(sum(row["step"] == NUM_STEPS - 1 for row in mine) == ACCUMULATION for mine in rows)
