"""A console that cannot be written is one line, and no exception."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, sys
from tunesmith.train.track.console import Console
logging.basicConfig(stream=sys.stdout)
console = Console(plain=True)
console.begin(100, 0)
for step in range(1, 101):
    console.step(step, {"train/loss": 1.0}, epoch=0.0)
    console.warn("something")
    logging.warning("a library's line")
console.end([("loss", "1.0")], "Finished")
sys.stderr.write("came to the end\\n")
"""


def run_with(stdout: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )


def test_a_full_disk_behind_the_console_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = run_with(full)
    assert done.returncode == 0
    first, last = done.stderr.splitlines()
    assert first.startswith("warning: stdout cannot be written ([Errno 28] No space left on device)")
    assert last == "came to the end"


def test_a_reader_that_has_gone_is_one_line() -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        done = run_with(reader.stdin)
    assert done.returncode == 0
    assert "Broken pipe" in done.stderr
    assert done.stderr.splitlines()[-1] == "came to the end"
    assert len(done.stderr.splitlines()) == 2


def test_what_can_be_written_is_written() -> None:
    done = run_with(subprocess.PIPE)
    assert done.returncode == 0
    assert done.stdout.count("warning: something") == 100
    assert done.stderr == "came to the end\n"
