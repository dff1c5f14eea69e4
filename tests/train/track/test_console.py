import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from rich.text import Text

from tunesmith.train.track import console as console_module
from tunesmith.train.track.console import Console, duration, figure

METRICS: dict[str, float | None] = {
    "train/loss": 0.84123,
    "train/learning_rate": 1.8e-3,
    "train/grad_norm": 0.6234,
    "throughput/tokens_per_second": 21345.6,
    "throughput/target_tokens_per_second": 9876.5,
    "throughput/data_fraction": 0.0123,
    "memory/peak_memory_gib": 6.14,
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the console sees; a test sets clock[0]."""
    now = [1000.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    return now


def steps_of(output: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"^step ([\d,]+)/", output, flags=re.MULTILINE)]


def test_a_plain_line_has_every_figure_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()  # pytest's stdout is no terminal
    assert console.plain
    console.begin(400, 0)
    console.step(1, METRICS | {"throughput/mfu": 0.4123, "eval/loss": None}, epoch=0.5)
    assert capsys.readouterr().out == (
        "step 1/400  epoch 0.50  loss 0.8412  learning rate 1.80e-03  grad norm 0.623  21,346 tokens/s  "
        "9,876 targets/s  MFU 41.2 %  data wait 1.2 %  6.1 GiB  0 s left\n"
    )


def test_mfu_and_eval_loss_are_left_out_until_they_are_known(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    console = Console(plain=True)
    console.begin(40, 0)
    console.step(1, METRICS | {"throughput/mfu": None}, epoch=0.1)
    console.evaluation(1, {"eval/loss": 0.912, "eval/token_accuracy": 0.8})
    clock[0] += 10
    console.step(2, METRICS, epoch=0.2)
    first, evaluation, second = capsys.readouterr().out.splitlines()
    assert "MFU" not in first
    assert "eval loss" not in first
    assert evaluation == "evaluation at step 1: loss 0.9120, token accuracy 80.0 %"
    assert "eval loss 0.9120" in second


@pytest.mark.parametrize(
    ("step_seconds", "steps"),
    [
        (0.2, [1, 11, 21, 31, 41, 50]),  # every 10 steps
        (2.0, [1, 4, 7, 10, 13]),  # every 5 seconds
        (30.0, [1, 2, 3, 4, 5]),  # every step
    ],
)
def test_plain_lines_come_every_ten_steps_or_five_seconds(
    capsys: pytest.CaptureFixture[str], clock: list[float], step_seconds: float, steps: list[int]
) -> None:
    console = Console(plain=True)
    console.begin(steps[-1], 0)
    for step in range(1, steps[-1] + 1):
        clock[0] += step_seconds
        console.step(step, METRICS, epoch=0.0)
    assert steps_of(capsys.readouterr().out) == steps


def test_a_long_run_does_not_fill_the_log(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    console = Console(plain=True)
    console.begin(100_000, 0)
    for step in range(1, 100_001):
        clock[0] += 0.86  # a day
        console.step(step, METRICS, epoch=0.0)
    steps = steps_of(capsys.readouterr().out)
    assert steps[0] == 1
    assert steps[-1] == 100_000
    assert 1000 < len(steps) < 8000


def test_the_last_step_is_shown_even_when_the_run_stops_early(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    console = Console(plain=True)
    console.begin(400, 0)
    for step in range(1, 18):
        clock[0] += 0.2
        console.step(step, METRICS, epoch=0.0)
    console.end([("eval loss", "0.5")], "stopped early")
    output = capsys.readouterr().out
    assert steps_of(output) == [1, 11, 17]
    assert output.rstrip().endswith("eval loss  0.5")


def test_time_left_follows_recent_steps_and_not_evaluations(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    console = Console(plain=True)
    console.begin(400, 100)
    for step in range(101, 201):
        clock[0] += 2.0
        console.step(step, METRICS, epoch=0.0)
        console.phase("evaluating")
        clock[0] += 100.0
        console.evaluation(step, {"eval/loss": 1.0})
        if step % 3:  # most steps, so that a median alone would not do
            console.phase("saving a checkpoint")
            clock[0] += 100.0
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")][-1]
    step = int(last.split("/")[0].split()[1])
    assert last.endswith(f"{duration((400 - step) * 2)} left")


def test_a_counting_phase_does_not_print_every_number(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    console = Console(plain=True)
    for done in range(100):
        console.phase(f"generating answers {done}/100")
        clock[0] += 0.1
    console.phase("saving a checkpoint")
    assert capsys.readouterr().out.splitlines() == [
        "generating answers 0/100",
        "generating answers 50/100",
        "saving a checkpoint",
    ]


def test_errors_go_to_stderr_and_the_rest_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(plain=True)
    console.warn("no [key] found")
    console.print("a [bold]string[/bold] is no markup, a:b is no emoji :smile:")
    console.print(Text("a renderable", style="green"))
    console.error("ConfigError: no such file.\n  at: data.train")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "warning: no [key] found",
        "a [bold]string[/bold] is no markup, a:b is no emoji :smile:",
        "a renderable",
    ]
    assert err == "ConfigError: no such file.\n  at: data.train\n"


def test_a_log_file_gets_long_rows_unbroken(capsys: pytest.CaptureFixture[str]) -> None:
    Console(plain=True).start_summary([("model", "m" * 150), ("batch", "8 x 2")], "support_bot")
    title, model, batch = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert title == "support_bot"
    assert model.split() == ["model", "m" * 150]
    assert batch.split(maxsplit=1) == ["batch", "8 x 2"]


@pytest.mark.parametrize(
    "ending", ["raise RuntimeError('boom')", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGINT)", "pass"]
)
def test_the_terminal_is_whole_after_any_end(ending: str) -> None:
    output, code = run_on_a_terminal(f"console.step(1, metrics, epoch=0.1)\n{ending}")
    assert "step 1/50" in output
    assert "loss 0.5000" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")  # the last word on the cursor: visible
    assert output.rpartition("\n")[2].replace("\x1b[?25h", "") == ""  # the shell's prompt gets a line of its own
    assert (code == 0) == (ending == "pass")
    if "boom" in ending:
        assert output.index("step 1/50") < output.rindex("RuntimeError: boom")


def test_a_killed_run_leaves_a_visible_cursor() -> None:
    output, code = run_on_a_terminal("console.step(1, metrics, epoch=0.1)\nos.kill(os.getpid(), signal.SIGKILL)")
    assert code == -signal.SIGKILL
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


def test_prints_of_others_do_not_break_the_live_line() -> None:
    output, _ = run_on_a_terminal(
        "console.step(1, metrics, epoch=0.1)\nprint('from a library')\nconsole.step(50, metrics, epoch=1.0)"
    )
    assert re.search(r"(^|\n|\x1b\[2K)from a library\r?\n", output)
    assert "step 50/50" in output


def run_on_a_terminal(body: str) -> tuple[str, int]:
    """Runs a program with a live console on a pseudo-terminal; returns what the terminal got and the exit code."""
    code = (
        textwrap.dedent("""
            import os, signal, sys
            from tunesmith.train.track.console import Console
            metrics = {"train/loss": 0.5}
            console = Console()
            assert not console.plain
            console.begin(50, 0)
        """)
        + body
    )
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        received = io.BytesIO()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and select.select([leader], [], [], 60)[0]:
            try:
                received.write(os.read(leader, 65536))
            except OSError:  # the program has closed its side
                break
        os.close(leader)
        code_of_exit = process.wait(timeout=60)
    return received.getvalue().decode(), code_of_exit


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("train/loss", 2.34567, "2.3457"),
        ("train/loss", float("nan"), "nan"),
        ("train/learning_rate", 2e-5, "2.00e-05"),
        ("throughput/mfu", 0.4123, "41.2 %"),
        ("eval/exact_match", 1.0, "100.0 %"),
        ("throughput/tokens_per_second", 1234567.8, "1,234,568"),
        ("eval/perplexity", 1.2345, "1.23"),
        ("num_parameters", 7_000_000_000, "7,000,000,000"),
        ("eval/loss", None, "-"),
    ],
)
def test_figures_are_written_as_a_person_reads_them(name: str, value: float | None, text: str) -> None:
    assert figure(name, value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (3599.6, "1:00:00 h"), (93784, "26:03:04 h")]
)
def test_durations_have_their_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
