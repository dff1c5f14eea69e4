"""Runs many command lines of a launch script as processes of their own that share one import of torch and DeepSpeed.

Each line of stdin is a command: {"script": "train", "arguments": [...], "root": folder to watch, "env": {...}} as JSON.
Each line of stdout is its answer: exit code, stdout, stderr, and the paths below root that it left. A forked child runs
the script's own main(), in root, with the variables of env set (null: taken away), and says yes to whatever asks.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HEAVY = ("train.run.run", "train.run.finish", "train.run.loop", "train.run.setup", "train.run.summary")


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def in_child(script: str, arguments: list[str], env: dict[str, str | None], out: str, err: str) -> None:
    for name, value in env.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    Path(out).write_text("yes\n" * 99)
    os.dup2(os.open(out, os.O_RDONLY), 0)
    Path(out).unlink()
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from tunesmith.launch.arguments import main

    module = importlib.import_module(f"tunesmith.launch.{script}")
    sys.argv = [f"launch/{script}.py", *arguments]
    try:
        main(getattr(module, script))
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def answer(script: str, arguments: list[str], env: dict[str, str | None], root: Path, scratch: str) -> dict[str, Any]:
    before = tree(root)
    out, err = f"{scratch}/out", f"{scratch}/err"
    child = os.fork()
    if child == 0:
        in_child(script, arguments, env, out, err)
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": Path(out).read_text(),
        "stderr": Path(err).read_text(),
        "left": sorted(tree(root) - before),
    }


if __name__ == "__main__":
    for name in HEAVY:
        importlib.import_module(f"tunesmith.{name}")
    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            task = json.loads(line)
            os.chdir(task["root"])
            said = answer(task["script"], task["arguments"], task.get("env", {}), Path(task["root"]), scratch)
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
