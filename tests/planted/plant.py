"""make planted: faults that people make, planted one at a time in a copy; each must fail a test of `make test`.

    python tests/planted/plant.py               # all of them; exit code 1 when one survives
    python tests/planted/plant.py microloss gas  # these

A fault is a file NAME.patch: what it is, lines `caught by: tests/...` with the files or tests of which one must fail,
and a diff. Without a fault the same tests must pass. Only tests that `make test` runs count.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = str(Path(sys.executable).with_name("pytest"))
IN_MAKE_TEST = "not slow and not torture and not cluster and not gpu"
NOT_COPIED = (".git", ".venv", "runs", "outputs", "build", "*.egg-info", "__pycache__", ".*_cache")
OPTIONS = "addopts=--import-mode=importlib --strict-markers"  # a test that is too slow has not caught a fault
AT_ONCE = 2
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Fault:
    """One patch. Raises ValueError where it names no test."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def tests(self) -> list[str]:
        found = re.findall(r"^caught by: (\S+)$", self.path.read_text(encoding="utf-8"), re.MULTILINE)
        if not found:
            raise ValueError(f"{self.path}: it has no line `caught by: tests/...`")
        return found


@contextmanager
def copy_of_the_project() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder) / "tunesmith"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        yield copy


def run_tests(copy: Path, tests: list[str], workers: int = 0) -> subprocess.CompletedProcess[str]:
    """pytest in the copy, up to the first test that fails. Raises RuntimeError when pytest itself fails."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "TMPDIR": str(copy.parent)}
    command = [PYTEST, "-x", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", IN_MAKE_TEST]
    command += ["-o", OPTIONS, "-n", str(workers), "--dist", "worksteal"]
    done = subprocess.run(
        [*command, *tests], cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    if done.returncode not in (0, 1) or not re.search(r"\d+ (passed|failed)", done.stdout):
        raise RuntimeError(
            f"pytest ended with {done.returncode} on {tests}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done


def caught(fault: Fault) -> str:
    """The test that fails with the fault; empty when none does."""
    with copy_of_the_project() as copy:
        apply = ["git", "apply", "-C1", "--recount", str(fault.path)]
        done = subprocess.run(apply, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{fault.path} does not fit the code any more:\n{done.stderr}")
        tests = run_tests(copy, fault.tests)
    found = re.search(r"^FAILED (\S+)", tests.stdout, re.MULTILINE)
    if tests.returncode == 1 and found is None:
        raise RuntimeError(f"{fault.name}: tests broke instead of failing:\n{tests.stdout[-3000:]}")
    return found[1] if found else ""


def main(names: list[str]) -> int:
    faults = [Fault(path) for path in sorted(Path(__file__).parent.glob("*.patch"))]
    if strangers := set(names) - {fault.name for fault in faults}:
        sys.stderr.write(f"there is no planted fault {', '.join(sorted(strangers))}\n")
        return 2
    chosen = [fault for fault in faults if not names or fault.name in names]
    with copy_of_the_project() as copy:
        sound = run_tests(copy, sorted({test for fault in chosen for test in fault.tests}), AT_ONCE)
    if sound.returncode != 0:
        sys.stdout.write(f"without a fault:\n{sound.stdout[-3000:]}")
        return 1
    num_caught = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for fault, test in zip(chosen, pool.map(caught, chosen), strict=True):
            num_caught += bool(test)
            sys.stdout.write(f"{fault.name:24} {f'caught by {test}' if test else 'SURVIVED'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"planted: caught={num_caught}/{len(chosen)}\n")
    return int(num_caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
