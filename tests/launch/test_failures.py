"""A rank that dies, raises or hangs ends the run in seconds, with one line that says which, where and how."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.launch.environment import free_port

SCRIPT = Path(__file__).parents[2] / "launch/train.py"
STEPS = ("+exp=debug", "output_dir=run", "schedule.max_steps=6", "checkpoint.every_steps=2", "evaluate.generate=false")
ALL_GONE_SECONDS = 10
TIMEOUT_SECONDS = 6
LIMIT_GIB = 4  # of address space, of which a rank takes less than 2
SHORT = [f"cluster.{name}_minutes={TIMEOUT_SECONDS / 60}" for name in ("timeout", "save_timeout")]
CAUSE = re.compile(r"^rank (?P<rank>\d+) of \d+.*? at step (?P<step>\d+), in (?P<phase>[^,:;\n]+)", re.MULTILINE)


@dataclass
class Ended:
    """A run that failed, and the seconds from its last metrics row to the launcher's end."""

    code: int
    said: str
    seconds: float
    run_dir: Path

    @property
    def cause(self) -> tuple[int, int, str]:
        found = list(CAUSE.finditer(self.said))
        assert len(found) == 1, f"{len(found)} causes in:\n{self.said[-6000:]}"
        return int(found[0]["rank"]), int(found[0]["step"]), found[0]["phase"]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("step-*"))


Fail = Callable[..., Ended]


@pytest.fixture
def fail(launch_environment: dict[str, str], tmp_path: Path) -> Fail:
    """fail("torchrun", "kill:rank=1,step=3", *overrides) runs a training with planned faults to its end."""

    def call(
        launcher: str, faults: str, *overrides: str, num_ranks: int = 2, limits: dict[int, int] | None = None
    ) -> Ended:
        program = shutil.which(launcher, path=str(Path(sys.executable).parent))
        assert program
        ranks = ["--num_gpus" if launcher == "deepspeed" else "--nproc_per_node", str(num_ranks)]
        command = [program, *ranks, "--master_port", str(free_port()), str(SCRIPT), *STEPS, *overrides]
        environment = launch_environment | {"TUNESMITH_FAULTS": faults}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            preexec_fn=lambda: [resource.setrlimit(kind, (size, size)) for kind, size in (limits or {}).items()],
        )
        ended = time.time()
        metrics = tmp_path / "run/metrics.jsonl"
        seconds = ended - metrics.stat().st_mtime if metrics.exists() else -1.0
        return Ended(done.returncode, done.stdout + done.stderr, seconds, tmp_path / "run")

    return call


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.row(1)
@pytest.mark.parametrize(
    ("launcher", "rank", "phase"),
    [
        ("deepspeed", 1, "forward"),
        pytest.param("torchrun", 0, "update", marks=pytest.mark.slow),
        pytest.param("torchrun", 1, "saving", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_is_named(fail: Fail, launcher: str, rank: int, phase: str) -> None:
    step = 4 if phase == "saving" else 3
    ended = fail(launcher, f"kill:rank={rank},step={step},phase={phase}")
    assert ended.code != 0
    assert ended.seconds <= ALL_GONE_SECONDS
    assert ended.cause == (rank, step, phase)
    assert "was killed by SIGKILL" in ended.said
    assert "Traceback" not in ended.said.replace("To enable traceback", "") or launcher == "torchrun"
    failure = json.loads((ended.run_dir / "failure.json").read_text())
    assert (failure["rank"], failure["step"], failure["phase"], failure["kind"]) == (rank, step, phase, "killed")
    assert json.loads((ended.run_dir / "summary.json").read_text())["status"] == "failed"
    assert ended.checkpoints == ["step-000002"]
    assert not list(Path("/dev/shm").glob("tunesmith-ranks-*"))


@pytest.mark.row(2)
@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("deepspeed", 0)])
def test_the_traceback_of_the_rank_that_raised_comes_first_and_alone(fail: Fail, launcher: str, rank: int) -> None:
    ended = fail(launcher, f"raise:rank={rank},step=3,phase=backward")
    assert ended.code != 0
    assert ended.seconds <= ALL_GONE_SECONDS
    assert ended.cause == (rank, 3, "backward")
    ours = ended.said[: CAUSE.search(ended.said).end()]  # type: ignore[union-attr]
    assert ours.count("Traceback (most recent call last)") == 1
    assert "RuntimeError: planned fault" in ours
    assert "in optimizer_step" in ours
    assert "Connection closed" not in ended.said  # what the other rank met is a consequence
    assert "planned fault" in json.loads((ended.run_dir / "failure.json").read_text())["traceback"]


@pytest.mark.row(3)
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_exits_early_fails_the_run(fail: Fail, launcher: str) -> None:
    """With code 0, for which DeepSpeed's launcher would wait for ever."""
    ended = fail(launcher, "exit:rank=1,step=4,phase=saving")
    assert ended.code != 0
    assert ended.seconds <= ALL_GONE_SECONDS
    assert ended.cause == (1, 4, "saving")
    assert "exited with code 0, before the run was over" in ended.said
    assert ended.checkpoints == ["step-000002"]


HANGS = [
    # A rank that is slow, but within its time, is left alone.
    pytest.param(
        "torchrun",
        "slow:rank=0,step=1,phase=forward,seconds=4; sleep:rank=1,step=3,phase=forward",
        (1, 3, "forward"),
        marks=pytest.mark.slow,
    ),
    pytest.param("deepspeed", "stop:rank=1,step=3,phase=backward", (1, 3, "backward"), marks=pytest.mark.slow),
    pytest.param("torchrun", "gil:rank=1,step=3,phase=evaluating", (1, 3, "evaluating"), marks=pytest.mark.slow),
    pytest.param("deepspeed", "gil:rank=0,step=3,phase=update", (0, 3, "update"), marks=pytest.mark.slow),
    pytest.param("torchrun", "sleep:rank=0,step=4,phase=saving", (0, 4, "saving"), marks=pytest.mark.slow),
]


@pytest.mark.row(4)
@pytest.mark.parametrize(("launcher", "faults", "cause"), HANGS)
def test_a_rank_that_hangs_is_named_and_all_stacks_are_written(
    fail: Fail, launcher: str, faults: str, cause: tuple[int, int, str]
) -> None:
    ended = fail(launcher, faults, *SHORT)
    assert ended.code != 0
    assert TIMEOUT_SECONDS <= ended.seconds <= TIMEOUT_SECONDS + 5
    assert ended.cause == cause
    assert f"rank {1 - cause[0]} waits for it" in ended.said
    stacks = {rank: (ended.run_dir / f"stacks/rank-{rank}.txt").read_text() for rank in (0, 1)}
    for rank, text in stacks.items():
        if rank == cause[0] and "stop:" in faults:
            assert "a stopped process runs nothing" in text
        else:
            assert "tunesmith/train/run/loop.py" in text
    if "stop:" not in faults:
        assert "fault_plan.py" in stacks[cause[0]]
    assert ended.checkpoints == ["step-000002"]


@pytest.mark.slow
def test_three_ranks_end_when_one_of_them_hangs(fail: Fail) -> None:
    ended = fail(
        "torchrun",
        "sleep:rank=1,step=1,phase=backward",
        *SHORT,
        "cluster.start_timeout_minutes=0.5",
        "batch.global_batch_size=6",
        num_ranks=3,
    )
    assert ended.code != 0
    assert ended.cause == (1, 1, "backward")
    assert "rank 0, 2 wait for it" in ended.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "kill:rank=1,step=3,phase=forward",
            r"^rank 1 of 2 on \S+ was last heard of \d+ s ago, at step 3, in ",
        ),  # as of a second before
        (
            "raise:rank=1,step=3,phase=forward",
            r"^rank 1 of 2 failed at step 3, in forward: RuntimeError: planned fault",
        ),
        ("sleep:rank=1,step=3,phase=forward", r"^rank 1 of 2 \(pid \d+\) hangs at step 3, in forward"),
    ],
)
def test_a_rank_of_another_node_is_named(
    launch_environment: dict[str, str], tmp_path: Path, fault: str, said: str
) -> None:
    """Each rank is told that it is alone on its node; nobody but the ranks themselves ends the others."""
    alike = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own_node = alike | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TUNESMITH_FAULTS": fault}
    with (tmp_path / "said").open("w") as out:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), *STEPS, *SHORT],
                env=launch_environment | own_node | {"RANK": rank},
                cwd=tmp_path,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            for rank in ("0", "1")
        ]
        codes = [process.wait(timeout=200) for process in ranks]
    assert 0 not in codes
    text = (tmp_path / "said").read_text()
    assert len(re.findall(said, text, re.MULTILINE)) == 1, text[-6000:]
    assert len(re.findall(r"^rank \d of 2", text, re.MULTILINE)) == 1, text[-6000:]
    assert time.time() - (tmp_path / "run/metrics.jsonl").stat().st_mtime < TIMEOUT_SECONDS + 15


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.row(24)
def test_host_memory_that_runs_out_is_one_message_with_three_settings(fail: Fail) -> None:
    limits = {resource.RLIMIT_AS: LIMIT_GIB * 2**30}
    ended = fail("torchrun", "oom:rank=1,step=3,phase=forward", "engine=ddp", limits=limits)
    assert ended.code != 0
    assert time.time() - (ended.run_dir / "failure.json").stat().st_mtime <= ALL_GONE_SECONDS
    problem = re.search(r"^TrainingError: (.*)\n  do: (.*)$", ended.said, re.MULTILINE)
    assert problem, ended.said[-6000:]
    assert problem[1].startswith("rank 1 of 2 ran out of host memory at step 3, in forward: peak ")
    assert f"address space limited to {LIMIT_GIB}.0 GiB" in problem[1]
    assert problem[2].count("; or ") == 2
    assert "memory=recompute" in problem[2]
    assert "micro_batch_size" not in problem[2]  # it is 1 already
    assert ended.said.count("TrainingError") == 1
    assert "Traceback" not in ended.said[: problem.end()]


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.row(26)
def test_a_full_console_disk_is_one_line_and_the_run_finishes(
    launch_environment: dict[str, str], tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *STEPS],
            cwd=tmp_path,
            env=launch_environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("No space left on device") == 1
    assert "training goes on without it" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/model/config.json").is_file()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) >= 6
