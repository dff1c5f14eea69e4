"""Real ranks for tests: pools of processes that stay up for the whole session."""

import inspect
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from zygote import Forked, Zygote

from tunesmith.launch.environment import free_port

WORKER = Path(__file__).parent / "worker.py"
TASK_SECONDS = 280  # below pytest's own limit, so that it is the pool that says which rank failed


def rank_environment(zygote: Zygote, rank: int, world_size: int, port: int) -> dict[str, str]:
    """What deepspeed's launcher would set, and folders of this session's own."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return zygote.env | {name: str(value) for name, value in (ranks | meeting).items()}


def in_pieces(rank: Any, **arguments: Any) -> Any:
    return rank.train_in_pieces(**arguments)


class RankPool:
    """world_size processes in one process group; run() calls a function of a test module on all of them."""

    def __init__(self, zygote: Zygote, world_size: int, scratch: Path) -> None:
        self.zygote = zygote
        self.world_size = world_size
        self.scratch = scratch
        self._ranks: list[Forked] = []
        self._tasks: list[int] = []  # where each rank reads them
        self._num_tasks = 0

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What function(rank, **arguments) returned on each rank. Fails when a rank raises, dies or takes too long."""
        if not self._ranks:
            self._start()
        self._num_tasks += 1
        answer = self.scratch / f"answer-{self._num_tasks}"
        source = inspect.getsourcefile(function)
        task = {"file": source, "function": function.__name__, "arguments": arguments, "answer": str(answer)}
        for tasks in self._tasks:
            os.write(tasks, (json.dumps(task) + "\n").encode())
        return self._collect(answer)

    def train_in_pieces(self, **arguments: Any) -> list[Any]:
        """What Rank.train_in_pieces(overrides, run_dir, stop_after) gives on each rank."""
        return self.run(in_pieces, **arguments)

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.world_size):
            tasks = self.scratch / f"tasks-{port}.{rank}"
            os.mkfifo(tasks)
            self._tasks.append(os.open(tasks, os.O_RDWR))  # it ends, and the rank with it, when we do
            self._ranks.append(
                self.zygote.fork(
                    WORKER,
                    "serve",
                    cwd=self.scratch,
                    stdin=tasks,
                    stdout=self._log(rank),
                    env=rank_environment(self.zygote, rank, self.world_size, port),
                )
            )

    def _collect(self, answer: Path) -> list[Any]:
        deadline = time.monotonic() + TASK_SECONDS
        files = [Path(f"{answer}.{rank}") for rank in range(self.world_size)]
        while not all(file.exists() for file in files):
            problem = self._problem(files, deadline)
            if problem:
                self.stop()
                pytest.fail(problem)
            time.sleep(0.01)
        answers = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        errors = [f"rank {rank}: {found['error']}" for rank, found in enumerate(answers) if "error" in found]
        if errors:
            self.stop()  # the ranks may no longer be in step with each other
            pytest.fail("\n".join(errors))
        return [found["result"] for found in answers]

    def _problem(self, files: list[Path], deadline: float) -> str | None:
        for rank, forked in enumerate(self._ranks):
            if forked.code is not None and not files[rank].exists():
                return f"rank {rank} ended with {forked.code}:\n{self._said(rank)}"
        for rank, file in enumerate(files):  # the others may wait for this one for ever
            if file.exists() and "error" in (found := json.loads(file.read_text(encoding="utf-8"))):
                return f"rank {rank}: {found['error']}"
        if time.monotonic() > deadline:
            return f"no answer in {TASK_SECONDS} s:\n" + "\n".join(map(self._said, range(self.world_size)))
        return None

    def _log(self, rank: int) -> Path:
        return self.scratch / f"rank-{rank}.log"

    def _said(self, rank: int) -> str:
        return self._log(rank).read_text(encoding="utf-8", errors="replace")[-3000:]

    def stop(self) -> None:
        for forked in self._ranks:
            forked.send(signal.SIGKILL)
        for forked in self._ranks:
            forked.wait(20)
        for tasks in self._tasks:
            os.close(tasks)
        self._ranks, self._tasks = [], []


@pytest.fixture(scope="session")
def short_run(
    make_model: Callable[..., Path], make_records: Callable[..., Path], data_cache: Path
) -> Callable[..., list[str]]:
    """short_run(2, 8, "schedule=cosine", records=40) is a command line: eight fp32 steps of a tiny llama at ZeRO 2.

    What is given takes the place of what stands here. splits_all: under ZeRO 3 not even small weights stay whole.
    """

    def overrides(
        stage: int,
        num_steps: int | None,
        *given: str,
        records: int = 47,
        model: Path | None = None,
        splits_all: bool = False,
    ) -> list[str]:
        common = [
            f"model.name_or_path={model or make_model()}",
            f"data.train={make_records(records)}",
            f"data.cache_dir={data_cache}",
            f"engine={f'zero{stage}' if stage else 'ddp'}",
            "engine.precision=fp32",
            "batch.global_batch_size=8",
            "batch.micro_batch_size=2",
            "batch.sequence_length=96",
            "schedule=constant",
            "schedule.epochs=null",
            f"schedule.max_steps={'null' if num_steps is None else num_steps}",
            "optimizer.learning_rate=1e-3",
            "track=none",
        ]
        if splits_all and stage == 3:
            limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
            common += [f"engine.deepspeed.zero_optimization.stage3_{limit}=0" for limit in limits]
        return list({override.partition("=")[0]: override for override in [*common, *given]}.values())

    return overrides


@pytest.fixture(scope="session")
def ranks(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """ranks(n) is a pool of n rank processes, started at its first use and shared by the session."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(zygote, world_size, tmp_path_factory.mktemp(f"ranks-{world_size}"))
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.stop()


@pytest.fixture(scope="session")
def rank_environments(zygote: Zygote) -> Callable[[int], list[dict[str, str]]]:
    """rank_environments(n) is what each of n ranks of one new run needs in its environment."""

    def environments(world_size: int) -> list[dict[str, str]]:
        port = free_port()
        return [rank_environment(zygote, rank, world_size, port) for rank in range(world_size)]

    return environments
