"""Whole runs on forked ranks, and the table of what became of each fault."""

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tunesmith.launch.environment import free_port

ZYGOTE = Path(__file__).parent / "zygote.py"
NUM_STEPS = 12
EVERY_STEPS = 3  # between two saves


@dataclass
class Job:
    """The ranks of one run: how each ended (minus a signal's number), and what they said together."""

    num_ranks: int
    log: Path
    started: float
    pids: dict[int, int] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)  # on the monotonic clock
    wait_for_news: Callable[[float], None] = lambda seconds: None

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self, timeout: float = 120) -> "Job":
        """Until every rank has ended. Fails when they take longer, and then ends them."""
        deadline = time.monotonic() + timeout
        while len(self.codes) < self.num_ranks:
            if time.monotonic() > deadline:
                self.kill_all()
                pytest.fail(f"ranks {self.alive} did not end within {timeout} s:\n{self.said[-3000:]}")
            self.wait_for_news(0.1)
        return self

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Until something is true of the running ranks. Fails when they end first."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"it never came:\n{self.said[-3000:]}"
            assert not self.codes, f"a rank ended first: {self.codes}\n{self.said[-3000:]}"
            self.wait_for_news(0.01)

    @property
    def alive(self) -> list[int]:
        return [rank for rank in self.pids if rank not in self.codes]

    @property
    def seconds_between_ends(self) -> float:
        """From the first rank's end to the last's."""
        return max(self.ended_at.values()) - min(self.ended_at.values())

    def send(self, rank: int, number: signal.Signals) -> None:
        if rank in self.alive:
            os.kill(self.pids[rank], number)

    def kill_all(self) -> None:
        deadline = time.monotonic() + 20
        while len(self.codes) < self.num_ranks and time.monotonic() < deadline:
            for rank in self.alive:
                self.send(rank, signal.SIGKILL)
            self.wait_for_news(0.1)


class Zygote:
    """Forks ranks that have torch and DeepSpeed imported already: a run of two starts in about a second."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._jobs: dict[str, tuple[Job, int]] = {}
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_", "RANK"))}
        self._env = env | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TORCH_EXTENSIONS_DIR": str(scratch / "torch_extensions"),
            "XDG_CACHE_HOME": str(scratch / "cache"),
        }
        with (scratch / "zygote.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ZYGOTE)],
                env=self._env,
                cwd=scratch,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._news.put(json.loads(line))

    def _take_news(self, seconds: float) -> None:
        """Waits for one message of the zygote, for so long."""
        try:
            news = self._news.get(timeout=seconds)
        except queue.Empty:
            assert self._process.poll() is None, (self.scratch / "zygote.log").read_text()[-3000:]
            return
        job, rank = self._jobs[news["id"]]
        if "pid" in news:
            job.pids[rank] = news["pid"]
        else:
            job.codes[rank], job.ended_at[rank] = news["code"], time.monotonic()

    def start(
        self,
        overrides: list[str],
        *,
        cwd: Path,
        world_size: int = 2,
        env: dict[str, str] | None = None,
        limits: dict[int, dict[str, int]] | None = None,
    ) -> Job:
        """launch/train.py on forked ranks. limits: rank -> {"file_bytes": n} or {"memory_bytes": n}."""
        cwd.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        job = Job(world_size, cwd / f"log-{secrets.token_hex(4)}.txt", time.monotonic(), wait_for_news=self._take_news)
        assert self._process.stdin is not None
        for rank in range(world_size):
            id_ = secrets.token_hex(8)
            self._jobs[id_] = (job, rank)
            mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            task = {
                "id": id_,
                "arguments": overrides,
                "env": self._env | {name: str(value) for name, value in mine.items()} | (env or {}),
                "cwd": str(cwd),
                "log": str(job.log),
                **(limits or {}).get(rank, {}),
            }
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        while len(job.pids) < world_size:
            self._take_news(30)
        return job

    def stop(self) -> None:
        for job, _ in self._jobs.values():
            job.kill_all()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    started = Zygote(tmp_path_factory.mktemp("zygote"))
    yield started
    started.stop()


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
        return zygote.start([*tiny_run, *overrides], cwd=tmp_path, env=extra, **rest)

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
            job = zygote.start([*tiny_run, *overrides], cwd=cwd).wait()
            assert job.codes == {0: 0, 1: 0}, job.said[-3000:]
            made[overrides] = cwd / "run"
        return made[overrides]

    return run
