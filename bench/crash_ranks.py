"""Forks ranks from a process that has imported one side's libraries: a run of two starts in seconds.

    python bench/crash_ranks.py tunesmith|trainer

Each line of stdin starts a rank: {"id", "setting", "stage", "trace", "env", "cwd", "log", "file_bytes", "arm"}. Lines
of stdout say what became of it: {"id", "pid"} at once, {"id", "code"} at its end; minus the signal that ended it.
"arm" is what crash_at_arm() of crash_at.c takes, which must have been loaded with LD_PRELOAD.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

from crash_setting import Trace, overrides

# What a rank imports only when it needs it: most of its time, were it not done before the fork.
LATE = ["deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject", "deepspeed.moe.layer", "setuptools"]
LATE += ["torch.utils.cpp_extension", "torch._dynamo", "networkx", "transformers.models.llama.modeling_llama"]
IMPORTS = {
    "tunesmith": [
        *(
            f"tunesmith.train.{name}"
            for name in ("run.run", "run.finish", "run.loop", "run.setup", "run.summary", "engine", "config.compose")
        ),
        *("peft", "hydra.compose"),
    ],
    "trainer": ["deepspeed", "accelerate", "transformers.trainer"],
}


def tell(**message: Any) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def trace_tunesmith(trace: Trace) -> None:
    """Notes each forward of this process."""
    from tunesmith.train.model.scorer import Scorer
    from tunesmith.train.ranks.progress import progress

    nll = Scorer.nll

    def traced(scorer: Any, batch: Any) -> Any:
        found = nll(scorer, batch)
        if found.num_correct is None:  # not an evaluation
            trace.note(progress.step, found.loss, batch.inputs["input_ids"], scorer._model.parameters())
        return found

    Scorer.nll = traced  # type: ignore[method-assign]


def run_side(side: str, task: dict[str, Any]) -> None:
    setting, stage, folder = Path(task["setting"]), task["stage"], Path(task["trace"])
    if side == "trainer":
        import crash_trainer

        crash_trainer.main(setting, stage, folder)
        return
    from tunesmith.launch.arguments import main
    from tunesmith.launch.train import train

    trace_tunesmith(Trace(folder, int(os.environ["RANK"])))
    sys.argv = ["launch/train.py", *overrides(setting, stage)]
    main(train)


def become_a_rank(side: str, task: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(target, number)
    if task["file_bytes"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"],) * 2)
    if task["arm"]:
        prefix, begin, end, number, operations = task["arm"]
        texts = [os.fsencode(text) for text in (prefix, begin, end, operations)]
        ctypes.CDLL(None).crash_at_arm(*texts[:3], ctypes.c_long(number), texts[3])
    try:
        run_side(side, task)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def serve(side: str) -> None:
    running: dict[int, str] = {}
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
                    become_a_rank(side, task)
                running[pid] = task["id"]
                tell(id=task["id"], pid=pid)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                tell(id=running.pop(pid), code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    for name in IMPORTS[sys.argv[1]] + LATE:
        importlib.import_module(name)
    gc.freeze()  # a rank's collections would look at all of it, and copy its pages
    serve(sys.argv[1])
