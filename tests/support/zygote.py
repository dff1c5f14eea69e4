"""Processes of tests in about a tenth of a second: forked from one that has imported torch and DeepSpeed already."""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROCESS = Path(__file__).with_name("zygote_process.py")
START_SECONDS = 120  # of the imports, on a loaded machine


@dataclass
class Forked:
    """A child of the zygote: how it ended (minus a signal's number), and when on the monotonic clock."""

    pid: int | None = None
    code: int | None = None
    ended_at: float | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, timeout: float) -> int:
        """Its exit code. Kills it and fails the test when it takes longer than so many seconds."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.code is not None, timeout):
                self.send(signal.SIGKILL)
                pytest.fail(f"process {self.pid} did not end within {timeout} s")
        assert self.code is not None
        return self.code

    def send(self, number: signal.Signals) -> None:
        if self.code is None and self.pid is not None:
            os.kill(self.pid, number)


class Zygote:
    """fork() calls a function of a Python file in a process of its own."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._forked: dict[str, Forked] = {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_", "RANK"))}
        self.env = kept | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "hf"),
            "TORCH_EXTENSIONS_DIR": str(scratch / "torch_extensions"),  # a stale build lock hangs DeepSpeed
            "XDG_CACHE_HOME": str(scratch / "cache"),
        }
        self._ready = threading.Event()
        self.imported_early: list[str] = []  # libraries that come with a start, though they are needed later
        self._process = self._start()
        if not self._ready.wait(START_SECONDS):
            pytest.fail(f"the zygote does not start:\n{(scratch / 'zygote.log').read_text()[-3000:]}")

    def fork(
        self,
        file: Path,
        function: str,
        arguments: dict[str, Any] | None = None,
        *,
        cwd: Path,
        stdout: Path,
        stderr: Path | None = None,
        stdin: Path = Path(os.devnull),
        env: dict[str, str] | None = None,
    ) -> Forked:
        """function(**arguments) of a file, with the variables of env and no others; its output is appended."""
        id_, forked = secrets.token_hex(8), Forked()
        self._forked[id_] = forked
        task = {"id": id_, "file": str(file), "function": function, "arguments": arguments or {}, "cwd": str(cwd)}
        task |= {"env": self.env if env is None else env, "stdin": str(stdin), "stdout": str(stdout)}
        task |= {"stderr": str(stderr or stdout)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        with forked.changed:
            if not forked.changed.wait_for(lambda: forked.pid is not None, START_SECONDS):
                pytest.fail(f"the zygote does not answer:\n{(self.scratch / 'zygote.log').read_text()[-3000:]}")
        return forked

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.scratch / "zygote.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(PROCESS)],
                env=self.env,
                cwd=self.scratch,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        self._listener.start()
        return process

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            news = json.loads(line)
            if "ready" in news:
                self.imported_early = news["early"]
                self._ready.set()
                continue
            forked = self._forked[news["id"]]
            with forked.changed:
                if "pid" in news:
                    forked.pid = news["pid"]
                else:
                    forked.code, forked.ended_at = news["code"], time.monotonic()
                forked.changed.notify_all()

    def stop(self) -> None:
        """Ends every process that is left, and then the zygote."""
        for forked in self._forked.values():
            forked.send(signal.SIGKILL)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._listener.join()
        self._process.stdout.close()
