"""A process that has imported torch, DeepSpeed and Tunesmith once, and forks a child for each task (see zygote.py).

Each line of stdin is a task: {"id", "file", "function", "arguments", "env", "cwd", "stdin", "stdout", "stderr"}; the
child calls function(**arguments) of the Python file. Lines of stdout say {"ready", "early"}, and then what became of
each child: {"id", "pid"} at once, {"id", "code"} when it has ended; minus the signal that ended it.
"""

import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import sys
import tempfile
import time
from typing import Any

BEFORE_DEEPSPEED = ("launch.train", "train.answer.bot", "train.data.prepare", "train.run.run")
HEAVY = (
    *(
        f"tunesmith.{name}"
        for name in (
            "train.run.finish",
            "train.run.loop",
            "train.run.setup",
            "train.run.summary",
            "train.engine",
            "train.answer.export",
            "train.track.report",
        )
    ),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject", "torch.utils.cpp_extension", "peft"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("pytest", "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2"),
)
REAPED_SECONDS = 0.5  # as a launcher, which looks now and then: until then the kernel knows how a rank ended


def tell(**message: Any) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def exit_code(pid: int) -> int:
    """Of a child that has ended and was not waited for; minus a signal's number."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def load(file: str) -> Any:
    name = f"forked_{os.path.basename(file).removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.path.append(os.path.dirname(file))  # for what a test keeps in a file beside it
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def child(task: dict[str, Any]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(task["env"])
    tempfile.tempdir = None  # TMPDIR may be another
    os.chdir(task["cwd"])
    written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(task["stdin"], os.O_RDONLY), 0)
    os.dup2(os.open(task["stdout"], written), 1)
    os.dup2(os.open(task["stderr"], written), 2)
    try:
        getattr(load(task["file"]), task["function"])(**task["arguments"])
        sys.stdout.flush()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def serve() -> None:
    running: dict[int, str] = {}
    ended: dict[int, float] = {}
    waiting = b""
    while True:
        if select.select([0], [], [], 0.02 if running or ended else None)[0]:
            read = os.read(0, 1 << 20)
            if not read:
                return
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                task = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    child(task)
                running[pid] = task["id"]
                tell(id=task["id"], pid=pid)
        for pid in list(running):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                tell(id=running.pop(pid), code=exit_code(pid))
                ended[pid] = time.monotonic()
        for pid in [pid for pid, at in ended.items() if time.monotonic() - at > REAPED_SECONDS]:
            os.waitpid(pid, 0)
            del ended[pid]


if __name__ == "__main__":
    for name in BEFORE_DEEPSPEED:
        importlib.import_module(f"tunesmith.{name}")
    early = [name for name in ("deepspeed",) if name in sys.modules]
    for name in HEAVY:
        importlib.import_module(name)
    sys.modules["tunesmith.train.config.compose"].compose_config(["+exp=debug"])  # it keeps what files gave
    gc.freeze()  # or the children's collector copies every page
    tell(ready=True, early=early)
    serve()
