"""Whole runs on forked ranks, and the table of what became of each fault."""

import json
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from zygote import Forked, Zygote

from tunesmith.launch.environment import free_port

TRAIN = Path(__file__).with_name("train_rank.py")
NUM_STEPS = 12
EVERY_STEPS = 3  # between two saves


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
        ranks.append(zygote.fork(TRAIN, "train", arguments, cwd=cwd, stdout=log, env=environment))
    return Job(log, ranks)


@pytest.fixture(scope="session")
def tiny_run(make_model: Callable[..., Path], make_records: Callable[..., Path], data_cache: Path) -> list[str]:
    """Overrides of a run of twelve steps with dropout and two forwards a step on two ranks, saved every three."""
    return [
        f"model.name_or_path={make_model(attention_dropout=0.1)}",
        f"data.train={make_records(47)}",
        f"data.cache_dir={data_cache}",
        "adapter=lora",
        "adapter.dropout=0.1",
        "engine=zero2",
        "engine.precision=fp32",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=2",
        "batch.sequence_length=96",
        "schedule=cosine",
        "schedule.epochs=null",
        f"schedule.max_steps={NUM_STEPS}",
        "optimizer.learning_rate=3e-3",
        f"checkpoint.every_steps={EVERY_STEPS}",
        "evaluate.generate=false",
        "track=none",
        "cluster.device=cpu",
        "output_dir=run",
    ]


Start = Callable[..., Job]


@pytest.fixture
def start(zygote: Zygote, tiny_run: list[str], tmp_path: Path) -> Start:
    """start("engine=zero3", faults="kill:rank=1,step=4") begins the tiny run in tmp_path/run, or goes on with it."""

    def begin(*overrides: str, faults: str = "", env: dict[str, str] | None = None, **rest: Any) -> Job:
        extra = ({"TUNESMITH_FAULTS": faults} if faults else {}) | (env or {})
        return start_ranks(zygote, [*tiny_run, *overrides], cwd=tmp_path, env=extra, **rest)

    return begin


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], dict[int, float]]:
    """losses(run_dir) is step -> loss, from metrics.jsonl; a last row that was cut short is left out."""

    def of(run_dir: Path) -> dict[int, float]:
        path = run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        rows = [row for row in map(json.loads, lines) if "train/loss" in row]
        return {row["step"]: row["train/loss"] for row in rows}

    return of


@pytest.fixture(scope="session")
def trained() -> Callable[[Path], bytes]:
    """trained(run_dir) is the bytes of the model that a run has left behind."""

    def of(run_dir: Path) -> bytes:
        return b"".join(path.read_bytes() for path in sorted((run_dir / "model").glob("*.safetensors")))

    return of


@pytest.fixture(scope="session")
def published() -> Callable[[Path], list[int]]:
    """published(run_dir) is the steps of its checkpoints, as their folders' names say; not by Tunesmith's own code."""

    def of(run_dir: Path) -> list[int]:
        manifests = (run_dir / "checkpoints").glob("step-*/MANIFEST.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests if "." not in path.parent.name)

    return of


@pytest.fixture(scope="session")
def left_alone(zygote: Zygote, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """left_alone("engine=zero3") is the folder of the tiny run that nothing happened to."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            cwd = tmp_path_factory.mktemp("left-alone")
            job = start_ranks(zygote, [*tiny_run, *overrides], cwd=cwd).wait()
            assert job.codes == {0: 0, 1: 0}, job.said[-3000:]
            made[overrides] = cwd / "run"
        return made[overrides]

    return run
