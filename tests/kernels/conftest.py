"""Triton kernels without a GPU: a process of their own, because Triton decides when it is imported."""

import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parent / "interpreted.py"
TASK_SECONDS = 280  # below pytest's own limit


class Interpreter:
    """A process with TRITON_INTERPRET=1; run() calls a function of a test module in it."""

    def __init__(self, scratch: Path) -> None:
        self._answers = scratch / "answers.jsonl"
        self._log = scratch / "log"
        self._answers.touch()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error::RuntimeWarning", str(WORKER), str(self._answers)],
                env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self._reader = self._answers.open(encoding="utf-8")

    def run(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """What function(**arguments) returns there; fails the test when it raises, dies or takes too long."""
        task = {"file": inspect.getsourcefile(function), "function": function.__name__, "arguments": arguments}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + TASK_SECONDS
        line = ""
        while not line.endswith("\n"):
            line += self._reader.readline()
            if line.endswith("\n"):
                break
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no answer from the interpreter's process:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.002)
        answer = json.loads(line)
        if "error" in answer:
            pytest.fail(answer["error"])
        return answer["result"]

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._reader.close()


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """interpreter.run(function, name=value, ...) calls a function of this test module where Triton kernels run."""
    started = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield started
    started.stop()
