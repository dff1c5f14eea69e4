"""Starts ranks quickly: a process that has imported torch and DeepSpeed once and forks a child for each rank.

Each line of stdin starts one: {"id", "arguments", "env", "cwd", "log", "file_bytes", "memory_bytes"}. Lines of stdout
say what became of it: {"id", "pid"} at once, {"id", "code"} when it has ended; minus the signal that ended it.
The child runs launch/train.py's own main().
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

HEAVY = (
    *(
        f"tunesmith.train.{name}"
        for name in (
            "run.run",
            "run.finish",
            "run.loop",
            "run.setup",
            "run.summary",
            "engine",
            "answer.export",
            "track.report",
        )
    ),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject", "torch.utils.cpp_extension", "peft"),
)

REAPED_SECONDS = 0.5  # as a launcher, which looks now and then: until then the kernel knows how a rank ended


def tell(**message: Any) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def exit_code(pid: int) -> int:
    """Of a child that has ended and was not waited for; minus a signal's number."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def become_a_rank(task: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if task.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"],) * 2)
    if task.get("memory_bytes"):
        resource.setrlimit(resource.RLIMIT_AS, (task["memory_bytes"],) * 2)
    sys.argv = ["launch/train.py", *task["arguments"]]
    from tunesmith.launch.arguments import main
    from tunesmith.launch.train import train

    try:
        main(train)
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
    ended: dict[int, tuple[str, float]] = {}
    waiting = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            read = os.read(0, 1 << 20)
            if not read:
                return
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                task = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    become_a_rank(task)
                running[pid] = task["id"]
                tell(id=task["id"], pid=pid)
        for pid in list(running):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                ended[pid] = (running.pop(pid), time.monotonic())
                tell(id=ended[pid][0], code=exit_code(pid))
        for pid in [pid for pid, (_, at) in ended.items() if time.monotonic() - at > REAPED_SECONDS]:
            os.waitpid(pid, 0)
            del ended[pid]


if __name__ == "__main__":
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # or the children's collector copies every page
    serve()
