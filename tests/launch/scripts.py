"""A script of launch/ as a forked process runs it (conftest.py)."""

import importlib
import sys


def run(script: str, arguments: list[str]) -> None:
    from tunesmith.launch.arguments import main

    module = importlib.import_module(f"tunesmith.launch.{script}")
    sys.argv = [f"launch/{script}.py", *arguments]
    main(getattr(module, script))
