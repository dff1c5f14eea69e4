"""A run that is asked to stop, by every launcher and in every way a launcher can be ended.

It is saved, its ranks end with 75, none is orphaned, and the same command goes on with bitwise the losses of a run left
alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from matrices import covered
from train_ranks import start_ranks
from zygote import Zygote

from tunesmith.launch.environment import free_port
from tunesmith.train.ranks.launchers import launcher_of
from tunesmith.train.ranks.stop import ENDS

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch/train.py")
NUM_STEPS = 6
SMALL = (
    "+exp=debug",
    "adapter=lora",
    "adapter.r=4",
    "adapter.dropout=0.1",
    "data.preview=0",
    "batch.sequence_length=96",
    "data.truncate=drop",
    f"schedule.max_steps={NUM_STEPS}",
    "evaluate.every_steps=3",
    "evaluate.batch_size=2",
    "evaluate.max_records=4",
    "evaluate.max_new_tokens=4",
    "checkpoint.every_steps=2",
    "output_dir=run",
)
RANKS = {"python": 1, "deepspeed": 2, "torchrun": 2}
SLOW_STEPS = "slow:phase=forward,step=0,last_step=100,seconds=0.2"  # two forwards a step and rank, or four


def command(launcher: str, *overrides: str) -> list[str]:
    program = {
        "python": [sys.executable],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"],
        "torchrun": [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"],
    }[launcher]
    port = [] if launcher == "python" else ["--master_port", str(free_port())]
    return [*program, *port, TRAIN, *SMALL, *overrides]


@dataclass
class Job:
    """A training under way in a folder of its own."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def said(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    @property
    def ends(self) -> list[str]:
        """What each rank said last: "running", "75 SIGTERM", "0"."""
        return [path.read_text() for path in sorted((self.folder / "ends").iterdir())]

    def find(self, launcher: str) -> int:
        """Process id of a launcher of this job."""
        own = psutil.Process(self.process.pid)
        return next(one.pid for one in (own, *own.children(recursive=True)) if launcher_of(one.cmdline()) == launcher)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 150
        while not (found := losses(self.folder)) or max(found) < step:
            assert time.monotonic() < deadline, self.said[-3000:]
            assert self.process.poll() is None, self.said[-3000:]
            time.sleep(0.05)

    def wait(self, seconds: float = 150) -> int:
        """The launcher's exit code, once nothing of the job runs any more."""
        code = self.process.wait(timeout=seconds)
        deadline = time.monotonic() + seconds
        while self.left():
            assert time.monotonic() < deadline, f"{self.left()} still run:\n{self.said[-3000:]}"
            time.sleep(0.05)
        return code

    def left(self) -> list[int]:
        """Its processes, wherever they hang in the tree: they were started in its folder."""
        found = []
        for process in psutil.process_iter(["pid", "cwd", "status"]):
            if process.info["cwd"] == str(self.folder) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.info["pid"])
        return found


@pytest.fixture
def start(launch_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """start("deepspeed", faults="...") begins a training; whatever it leaves is ended with the test."""
    jobs = []

    def begin(launcher: str, *overrides: str, faults: str = "") -> Job:
        (tmp_path / "ends").mkdir(exist_ok=True)
        for path in (tmp_path / "ends").iterdir():
            path.unlink()
        environment = launch_environment | {"TUNESMITH_FAULTS": faults, ENDS: str(tmp_path / "ends")}
        with (tmp_path / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                command(launcher, *overrides), cwd=tmp_path, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        jobs.append(Job(process, tmp_path))
        return jobs[-1]

    yield begin
    for job in jobs:
        for pid in job.left():
            os.kill(pid, signal.SIGKILL)
        job.process.wait()


def losses(folder: Path) -> dict[int, float]:
    """Of each step, without a last row that is cut short."""
    path = folder / "run/metrics.jsonl"
    rows = map(json.loads, path.read_text().split("\n")[:-1]) if path.exists() else []
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def newest(folder: Path) -> int:
    found = [int(path.parent.name[5:]) for path in (folder / "run/checkpoints").glob("step-*/MANIFEST.json")]
    return max(found, default=0)


def train_on(zygote: Zygote, num_ranks: int, folder: Path) -> None:
    """The same command to its end, on forked ranks."""
    ranks = start_ranks(zygote, list(SMALL), cwd=folder, world_size=num_ranks).wait()
    assert set(ranks.codes.values()) == {0}, ranks.said[-3000:]


@pytest.fixture(scope="module")
def alone(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[int, float]]:
    """alone(2) is the losses of a run of two ranks that nothing happened to."""
    made: dict[int, dict[int, float]] = {}

    def run(num_ranks: int) -> dict[int, float]:
        if num_ranks not in made:
            folder = tmp_path_factory.mktemp("alone")
            train_on(zygote, num_ranks, folder)
            made[num_ranks] = losses(folder)
            assert sorted(made[num_ranks]) == list(range(1, NUM_STEPS + 1))
        return made[num_ranks]

    return run


def assert_stopped(job: Job, launcher: str, saved: int | None, code: int | None) -> None:
    """Every rank ended with 75, what was done is saved, and it was said once."""
    assert all(end.startswith("75 ") for end in job.ends), job.said[-3000:]
    assert len(job.ends) == RANKS[launcher]
    if code is not None:
        assert code == (1 if launcher == "torchrun" else 75)  # torchrun has no other code for workers that fail
    assert f'File "{TRAIN}"' not in job.said, "a traceback of ours; torchrun's and deepspeed's own do not name it"
    assert newest(job.folder) == max(losses(job.folder), default=0)
    if saved is not None:
        assert newest(job.folder) == saved
    if newest(job.folder):
        assert json.loads((job.folder / "run/summary.json").read_text())["status"] == "stopped"
        assert job.said.count("stopped at step") == 1


# A signal at a place that one rank reaches, and the last step then done. In the default set each signal, launcher and
# kind of place once; test_stop_together.py has the places of the loop on ranks that stay up.
PLACES = [
    ("starting", "phase=starting", 0),
    ("preparing", "phase=preparing the data", 0),
    ("loading", "phase=loading the model", 0),
    ("step", "step=2,phase=forward", 3),
    ("evaluating", "step=3,phase=evaluating", 3),
    ("saving", "step=4,phase=saving", 4),
    ("generating", "phase=generating answers", 6),
    ("twice", "step=2,phase=forward", 3),
]
SIGNALS = ("term", "int", "usr1")
IN_TORTURE = [("torchrun", "usr1", "generating")]
MATRIX = [
    (launcher, SIGNALS[(row + column) % 3], place)
    for row, launcher in enumerate(RANKS)
    for column, (place, _, _) in enumerate(PLACES)
]


@pytest.mark.row(13)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "number", "place"),
    [
        *(pytest.param(*p, marks=pytest.mark.torture) for p in IN_TORTURE),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in MATRIX if p not in IN_TORTURE),
    ],
)
def test_a_signal_to_one_rank_stops_the_run_and_the_same_command_goes_on_bitwise(
    start: Callable[..., Job],
    alone: Callable[[int], dict[int, float]],
    zygote: Zygote,
    launcher: str,
    number: str,
    place: str,
) -> None:
    where, saved = next((where, saved) for name, where, saved in PLACES if name == place)
    rank = RANKS[launcher] - 1
    faults = f"{number}:rank={rank},{where}"
    if place == "twice":
        faults += f"; term:rank=0,step=2,phase=update; int:rank={rank},step=3,phase=saving"
    job = start(launcher, faults=faults)
    code = job.wait()
    assert_stopped(job, launcher, saved, code)
    if place == "step":
        again = start(launcher)
        assert again.wait() == 0, again.said[-3000:]
    else:
        train_on(zygote, RANKS[launcher], job.folder)
    assert losses(job.folder) == alone(RANKS[launcher])
    assert json.loads((job.folder / "run/summary.json").read_text())["status"] == "finished"


# Which process of the launcher is ended how. The exit code that a person then sees is the launcher's own affair.
ENDED = [
    ("deepspeed", "deepspeed", signal.SIGTERM),
    ("deepspeed", "deepspeed", signal.SIGKILL),
    ("deepspeed", "deepspeed.launcher.launch", signal.SIGTERM),
    ("deepspeed", "deepspeed.launcher.launch", signal.SIGUSR1),
    ("deepspeed", "deepspeed.launcher.launch", signal.SIGKILL),
    ("torchrun", "torchrun", signal.SIGTERM),
    ("torchrun", "torchrun", signal.SIGINT),
    ("torchrun", "torchrun", signal.SIGUSR1),
    ("torchrun", "torchrun", signal.SIGKILL),
]
ENDED_IN_TORTURE = [ENDED[0], ENDED[7]]


@pytest.mark.row(14)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "process", "number"),
    covered(ENDED, [], ENDED_IN_TORTURE),
)
def test_ending_a_launcher_saves_the_run_and_leaves_no_orphan(
    start: Callable[..., Job], launcher: str, process: str, number: signal.Signals
) -> None:
    job = start(launcher, "schedule.max_steps=1000", "checkpoint.every_steps=500", faults=SLOW_STEPS)
    job.wait_for_step(2)
    os.kill(job.find(process), number)
    started = time.monotonic()
    job.wait(60)
    assert time.monotonic() - started < 30
    assert_stopped(job, launcher, None, None)
    assert newest(job.folder) >= 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", RANKS)
def test_ctrl_c_saves_the_run(start: Callable[..., Job], launcher: str) -> None:
    job = start(launcher, "schedule.max_steps=1000", "checkpoint.every_steps=500", faults=SLOW_STEPS)
    job.wait_for_step(2)
    os.killpg(job.process.pid, signal.SIGINT)
    job.wait(60)
    assert all(end.startswith("75 ") for end in job.ends), job.said[-3000:]
    assert newest(job.folder) == max(losses(job.folder)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_time_limit_stops_a_run_of_two_ranks_in_time(start: Callable[..., Job]) -> None:
    started = time.monotonic()
    job = start(
        "torchrun", "schedule.max_steps=10000", "checkpoint.every_steps=1", "cluster.time_limit_minutes=1",
        faults=SLOW_STEPS,
    )  # fmt: skip
    code = job.wait(120)
    seconds = time.monotonic() - started
    assert seconds < 60 + 15, "the launcher's own start is not the process's"
    assert_stopped(job, "torchrun", None, code)
    assert "cluster.time_limit_minutes=1" in " ".join(job.ends)
