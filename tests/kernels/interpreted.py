"""A process in which Triton kernels run on the CPU (see conftest.py): calls functions of the test modules on request.

Each line of stdin is a task: {"file", "function", "arguments"}; each line of the answers' file is its result or error.
"""

import importlib.util
import json
import sys
import traceback
from typing import Any


def load(file: str, loaded: dict[str, Any]) -> Any:
    if file not in loaded:
        spec = importlib.util.spec_from_file_location(f"asked_{len(loaded)}", file)
        assert spec is not None
        assert spec.loader is not None
        loaded[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[file])
    return loaded[file]


def serve(answers: str) -> None:
    loaded: dict[str, Any] = {}
    with open(answers, "w", encoding="utf-8") as out:
        for line in sys.stdin:
            task = json.loads(line)
            try:
                answer = {"result": getattr(load(task["file"], loaded), task["function"])(**task["arguments"])}
            except Exception:
                answer = {"error": traceback.format_exc()}
            out.write(json.dumps(answer) + "\n")
            out.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
