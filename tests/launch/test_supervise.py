"""A training that dies is started again from its newest checkpoint, as long as that helps, and from nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tunesmith.launch.environment import free_port
from tunesmith.launch.supervise import read, with_output_dir
from tunesmith.launch.training_process import TrainingExit
from tunesmith.train.errors import ConfigError
from tunesmith.train.files.step_folders import newest_checkpoint

ROOT = Path(__file__).parents[2]

# A training of one process in miniature: steps, checkpoints where the real ones are, our signals and exit codes. It
# dies as `dies` says of each attempt, and writes down how it was started.
TRAINING = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from tunesmith.launch.arguments import main
from tunesmith.train.errors import ConfigError, Stopped
from tunesmith.train.ranks.stop import stop_request

def body(arguments):
    values = dict(argument.split("=", 1) for argument in arguments)
    restart, folder = int(os.environ["TUNESMITH_RESTART"]), Path(values["output_dir"])
    how = values["dies"].split(",")
    how = how[min(restart, len(how) - 1)]
    with stop_request.listening():
        stop_request.defer(lambda: "finishing the step, then saving")
        with open("starts.jsonl", "a") as file:  # a test may send its signal from here on
            file.write(json.dumps({"restart": restart, "arguments": arguments, "at": time.monotonic()}) + "\\n")
        done = max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*")), default=0)
        if how == "mistake":
            raise ConfigError("learning_rate must be above 0.")
        if "orphan" in how:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        while done < 100 and not stop_request.reason:
            time.sleep(float(values.get("step_seconds", "0")))
            done += 1
            if how != "stuck" and done % 10 == 0:
                save(folder, done)
            if "crash" in how and done == 15 + 30 * restart:
                os._exit(9)
            if how == "stuck" and done % 10 == 5:
                raise RuntimeError("always here")
        if stop_request.reason:
            if how == "cannot_save":
                raise RuntimeError("no room")
            save(folder, done)
            (folder / "stopped").write_text(str(done))
            raise Stopped(stop_request.reason, done)

def save(folder, step):
    target = folder / f"checkpoints/step-{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "MANIFEST.json").write_text("{}")

main(body)
"""


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """supervise("--max-restarts", "5", dies="crash") supervises a training in miniature; nothing is left of it."""
    (tmp_path / "train.py").write_text(TRAINING)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    started = []

    def begin(*options: str, dies: str, output_dir: str | None = "run", **values: str) -> subprocess.Popen[str]:
        overrides = [f"{name}={value}" for name, value in values.items()]
        folder = [f"output_dir={output_dir}"] if output_dir else []
        command = [sys.executable, str(tmp_path / "train.py"), f"dies={dies}", *folder, *overrides]
        started.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "launch/supervise.py"), *options, "--", *command],
                cwd=tmp_path,
                env=kept,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    left = [process.pid for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def starts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def wait_for_start(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 30
    while not (folder / "starts.jsonl").exists() or len(starts(folder)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)


def test_a_run_that_dies_three_times_is_brought_to_its_end(supervise, tmp_path: Path) -> None:
    process = supervise("--backoff-seconds", "0.1", dies="crash")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = starts(tmp_path)
    assert [start["restart"] for start in found] == [0, 1, 2, 3]
    assert ["resume.source=auto" in start["arguments"] for start in found] == [False, True, True, True]
    assert {next(a for a in start["arguments"] if a.startswith("output_dir=")) for start in found} == {"output_dir=run"}
    assert newest_checkpoint(tmp_path / "run") == 100
    assert "supervise: the training died: exit code 9" in err
    assert "supervise: restart 3 of at most 10 from step 70 in 0.1 s" in err


def test_an_output_folder_is_added_where_none_is_named_and_stays_the_same(supervise, tmp_path: Path) -> None:
    process = supervise("--backoff-seconds", "0", dies="crash", output_dir=None)
    process.communicate(timeout=60)
    assert process.returncode == 0
    folders = {next(a for a in start["arguments"] if a.startswith("output_dir=")) for start in starts(tmp_path)}
    assert len(folders) == 1
    assert folders.pop().startswith(f"output_dir={tmp_path}/runs/supervised-")


def test_without_progress_it_gives_up_with_one_line_and_waits_longer_each_time(supervise, tmp_path: Path) -> None:
    process = supervise("--backoff-seconds", "0.5", "--no-progress", "3", dies="stuck")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(starts(tmp_path)) == 3
    assert err.count("giving up") == 1
    assert "giving up: 3 attempts in a row made no newer checkpoint than step 0" in err
    assert "from step 0 in 0.5 s" in err
    assert "from step 0 in 1 s" in err


def test_restarts_are_counted_and_progress_gives_none_back(supervise, tmp_path: Path) -> None:
    process = supervise("--backoff-seconds", "0", "--max-restarts", "2", dies="crash")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 9
    assert len(starts(tmp_path)) == 3
    assert "giving up: it died 3 times (--max-restarts 2)" in err


@pytest.mark.parametrize(("dies", "code"), [("mistake", 2), ("never", 0)])
def test_what_cannot_or_need_not_be_done_again_is_not(supervise, tmp_path: Path, dies: str, code: int) -> None:
    process = supervise(dies=dies)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert len(starts(tmp_path)) == 1
    assert err.count("learning_rate") == (dies == "mistake")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on_the_run_saves_and_is_not_started_again(
    supervise, tmp_path: Path, number: signal.Signals
) -> None:
    process = supervise(
        dies="never", step_seconds="0.4"
    )  # long enough to say on a busy machine what is being waited for
    wait_for_start(tmp_path, 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(starts(tmp_path)) == 1
    assert f"{number.name}: finishing the step, then saving" in err
    assert newest_checkpoint(tmp_path / "run") == int((tmp_path / "run/stopped").read_text())


def test_a_run_that_dies_when_it_was_asked_to_stop_has_not_stopped(supervise, tmp_path: Path) -> None:
    process = supervise(dies="cannot_save", step_seconds="0.05")
    wait_for_start(tmp_path, 1)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "supervise: the training died: exit code 1" in err
    assert len(starts(tmp_path)) == 1


OBEYED = [  # what is left of an attempt that was asked to stop, and whether it did
    (75, {0: "75 SIGTERM", 1: "75 another rank was asked to stop"}, True),
    (-15, {0: "75 SIGTERM", 1: "75 the launcher has gone"}, True),  # the launcher was told too
    (-15, {}, True),  # the signal came before the first rank
    (1, {}, False),  # ranks on other machines
    (1, {0: "75 SIGTERM", 1: "running"}, False),
    (-15, {0: "1 rank 0 of 2 failed at step 4, in saving", 1: "running"}, False),
]


@pytest.mark.parametrize(("code", "ranks", "obeyed"), OBEYED)
def test_an_attempt_has_obeyed_when_no_rank_died_of_something_else(
    code: int, ranks: dict[int, str], obeyed: bool
) -> None:
    assert TrainingExit(code, ranks).has_obeyed is obeyed


def test_a_signal_while_it_waits_ends_it_at_once(supervise) -> None:
    process = supervise("--backoff-seconds", "100", dies="crash")
    assert any("restart 1 of" in line for line in process.stderr)  # it waits from here on
    process.terminate()
    process.communicate(timeout=5)
    assert process.returncode == 75


def test_a_killed_training_is_started_again_and_one_that_was_told_to_stop_is_not(supervise, tmp_path: Path) -> None:
    process = supervise("--backoff-seconds", "0", dies="never", step_seconds="0.05")
    wait_for_start(tmp_path, 1)
    (rank,) = psutil.Process(process.pid).children()
    rank.kill()
    wait_for_start(tmp_path, 2)
    (rank,) = psutil.Process(process.pid).children()
    rank.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "the training died: its launcher was ended by SIGKILL" in err
    assert len(starts(tmp_path)) == 2


def test_nothing_of_an_attempt_is_left_when_the_next_one_starts(supervise, tmp_path: Path) -> None:
    process = supervise("--backoff-seconds", "0", dies="orphan-crash,never")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(starts(tmp_path)) == 2  # and the fixture finds no process


def test_a_supervisor_that_is_killed_takes_its_training_down_saved(supervise, tmp_path: Path) -> None:
    process = supervise(dies="never", step_seconds="0.05")
    wait_for_start(tmp_path, 1)
    (rank,) = psutil.Process(process.pid).children()
    time.sleep(0.5)
    process.kill()
    rank.wait(timeout=10)
    assert newest_checkpoint(tmp_path / "run") == int((tmp_path / "run/stopped").read_text())


HOW_ENDED = [  # exit code of the launcher, what its ranks said: finished, stopped, mistake; dead otherwise
    (0, {0: "0", 1: "0"}, "finished"),
    (1, {0: "0", 1: "running"}, "finished"),
    (0, {0: "running", 1: "running"}, "dead"),  # deepspeed's command says 0 when its launch.py was killed
    (0, {0: "75 the launcher has gone", 1: "75 the launcher has gone"}, "dead"),
    (-15, {0: "75 SIGTERM", 1: "75 SIGTERM"}, "dead"),  # told by us: their launcher was killed
    (75, {0: "75 SIGTERM", 1: "75 another rank was asked to stop"}, "stopped"),
    (1, {0: "75 SIGUSR1", 1: "75 SIGTERM"}, "stopped"),  # torchrun says 1
    (1, {0: "75 SIGTERM", 1: "running"}, "dead"),  # rank 1 raised, and the launcher ended rank 0
    (-15, {0: "75 SIGTERM", 1: "75 the launcher has gone"}, "dead"),
    (1, {0: "2", 1: "running"}, "mistake"),
    (1, {0: "2 rank 0 of 2 failed at step 0, in loading the model", 1: "running"}, "mistake"),  # told by the watchdog
    (1, {0: "20 of nobody", 1: "running"}, "dead"),
    (2, {}, "mistake"),
    (75, {}, "stopped"),  # ranks on other machines
    (1, {0: "1 rank 1 of 2 was killed", 1: "running"}, "dead"),
    (-9, {}, "dead"),
]


@pytest.mark.parametrize(("code", "ranks", "how"), HOW_ENDED)
def test_how_an_attempt_ended_is_read_from_its_ranks_not_only_from_its_launcher(
    code: int, ranks: dict[int, str], how: str
) -> None:
    ended = TrainingExit(code, ranks)
    assert not TrainingExit(code, ranks, orphaned=True).was_stopped
    found = "mistake" if ended.mistake else "finished" if ended.finished else "stopped" if ended.was_stopped else "dead"
    assert found == how


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["torchrun", "launch/train.py"], "the command to run is missing"),
        (["--", "torchrun", "other.py"], "does not run launch/train.py"),
        (["--", "no-such-launcher", "launch/train.py"], "there is no program 'no-such-launcher'"),
        (["--retries", "3", "--", "python", "launch/train.py"], "'--retries' is not understood"),
        (["--max-restarts", "many", "--", "python", "launch/train.py"], "--max-restarts=many"),
        (["--no-progress", "0", "--", "python", "launch/train.py"], "--no-progress=0"),
    ],
)
def test_a_mistake_in_its_own_options_is_one_message(arguments: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        read(arguments)


def test_options_and_command_are_told_apart() -> None:
    limits, command = read(["--max-restarts=20", "--", sys.executable, "launch/train.py", "--max-restarts=5"])
    assert (limits.max_restarts, limits.no_progress, limits.backoff_seconds) == (20, 3, 5.0)
    assert command == [sys.executable, "launch/train.py", "--max-restarts=5"]


def test_the_last_output_folder_counts(tmp_path: Path) -> None:
    command, folder = with_output_dir(["train.py", "output_dir=one", f"++output_dir={tmp_path}/two", "name=x"])
    assert command[-1] == "name=x"
    assert folder == tmp_path / "two"
    command, folder = with_output_dir(["train.py", "output_dir=null"])
    assert command[-1] == f"output_dir={folder}"


SMALL = (
    "+exp=debug",
    "data.preview=0",
    "batch.sequence_length=96",
    "data.truncate=drop",
    "schedule.max_steps=6",
    "evaluate.every_steps=null",
    "evaluate.generate=false",
    "checkpoint.every_steps=2",
    "output_dir=run",
)


@pytest.fixture
def supervise_ranks(launch_environment: dict[str, str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """supervise_ranks("torchrun", "seed=1", faults="...") is the exit code of a real training of two ranks, and what it
    and its supervisor said. signal_at_step: SIGUSR1 to the supervisor then.
    """

    def call(launcher: str, *overrides: str, faults: str = "", signal_at_step: int = 0) -> tuple[int, str]:
        ranks = {"torchrun": "--nproc_per_node", "deepspeed": "--num_gpus"}[launcher]
        port = ["--master_port", str(free_port())]
        program = str(Path(sys.executable).with_name(launcher))
        train = [program, ranks, "2", *port, str(ROOT / "launch/train.py"), *SMALL, *overrides]
        with (tmp_path / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "launch/supervise.py"), "--backoff-seconds", "0", "--", *train],
                cwd=tmp_path,
                env=launch_environment | {"TUNESMITH_FAULTS": faults},
                stdout=log,
                stderr=log,
            )
        try:
            deadline = time.monotonic() + 150
            while signal_at_step and max(steps(tmp_path), default=0) < signal_at_step:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            if signal_at_step:
                process.send_signal(signal.SIGUSR1)
            code = process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
        assert not [one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(tmp_path)]
        return code, (tmp_path / "log.txt").read_text(errors="replace")

    return call


def steps(folder: Path) -> list[int]:
    path = folder / "run/metrics.jsonl"
    rows = map(json.loads, path.read_text().split("\n")[:-1]) if path.exists() else []
    return [row["step"] for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_that_loses_a_rank_is_brought_to_its_end(supervise_ranks, tmp_path: Path, launcher: str) -> None:
    code, said = supervise_ranks(launcher, faults="kill:rank=1,step=3,phase=forward")
    assert code == 0, said[-3000:]
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert said.count("supervise: the training died") == 1
    assert "supervise: restart 1 of at most 10 from step 2 in 0 s" in said
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_hides_a_mistake_and_it_is_still_not_tried_again(supervise_ranks) -> None:
    code, said = supervise_ranks("torchrun", "optimizer.learning_rate=-1")
    assert code == 2, said[-3000:]
    assert "supervise:" not in said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_signal_to_the_supervisor_saves_a_run_of_two_ranks(supervise_ranks, tmp_path: Path, launcher: str) -> None:
    slow = "slow:phase=forward,step=0,last_step=100,seconds=0.2"
    code, said = supervise_ranks(
        launcher, "schedule.max_steps=1000", "checkpoint.every_steps=500", faults=slow, signal_at_step=2
    )
    assert code == 75, said[-3000:]
    assert newest_checkpoint(tmp_path / "run") == max(steps(tmp_path)) >= 2
    assert "supervise:" not in said
