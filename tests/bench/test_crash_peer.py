"""The comparison of crashes with a peer: its page is that of its JSON, and a kill strikes where it says."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
SAVE = """
import ctypes, os, sys
root, number, log = sys.argv[1:]
where = f"{root}/checkpoint".encode(), b"step-2", b"step-3"
ctypes.CDLL(None).crash_at_arm(*where, ctypes.c_long(int(number)), log.encode())
for step in (1, 2, 3):
    os.makedirs(f"{root}/checkpoints/step-{step}")
    with open(f"{root}/checkpoints/step-{step}/staged", "wb", buffering=0) as file:
        file.write(b"first")
        file.write(b"second")
        os.fsync(file.fileno())
    os.rename(f"{root}/checkpoints/step-{step}/staged", f"{root}/checkpoints/step-{step}/file")
    open(f"{root}/elsewhere", "w").close()
    os.unlink(f"{root}/checkpoints/step-1/file") if step == 2 else None
"""
OPERATIONS = ["mkdir", "open", "write", "write", "fsync", "rename", "unlink"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    target = tmp_path_factory.mktemp("shim") / "crash_at.so"
    command = [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", target, BENCH / "crash_at.c", "-ldl"]
    subprocess.run(command, check=True)
    return target


def save(shim: Path, root: Path, number: int) -> tuple[int, list[str]]:
    """Exit code of three saves killed at an operation of the second, and the operations of that one."""
    (root / "checkpoints").mkdir(parents=True)
    log = root / "log"
    command = [sys.executable, "-S", "-c", SAVE, str(root), str(number), str(log)]
    done = subprocess.run(command, env={"LD_PRELOAD": str(shim)}, check=False)
    return done.returncode, [line.split()[1] for line in log.read_text().splitlines()]


def test_a_process_is_killed_before_each_operation_of_one_save_and_no_other(shim: Path, tmp_path: Path) -> None:
    assert save(shim, tmp_path / "none", 0) == (0, OPERATIONS)
    left = []
    for number in range(1, len(OPERATIONS) + 1):
        root = tmp_path / str(number)
        assert save(shim, root, number) == (-signal.SIGKILL, OPERATIONS[:number])
        folder = root / "checkpoints/step-2"
        left.append({path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None)
        assert (root / "checkpoints/step-1/file").exists()  # its removal is the last operation
        assert not (root / "checkpoints/step-3").exists()
    whole = b"firstsecond"
    staged = [{"staged": data} for data in (b"", b"first", whole, whole)]
    assert left == [None, {}, *staged, {"file": whole}]


def test_the_page_is_that_of_the_json(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    subprocess.run([sys.executable, BENCH / "crash_peer.py", "--table", "--page", page], check=True)
    assert page.read_text(encoding="utf-8") == (ROOT / "docs/crash_peer.md").read_text(encoding="utf-8")


def test_a_column_that_does_not_add_up_is_not_shown(tmp_path: Path) -> None:
    found = json.loads((BENCH / "results/crash_peer.json").read_text(encoding="utf-8"))
    found["sides"]["trainer"]["zero2"]["sweep"]["points"][0]["outcome"] = "something else"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(found), encoding="utf-8")
    command = [sys.executable, BENCH / "crash_peer.py", "--table", "--output", changed, "--page", tmp_path / "page.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "something else" in done.stderr


def test_tunesmith_lost_no_more_than_an_interval_and_loaded_no_damage() -> None:
    """Of the figures in the repository, which the page shows."""
    sides = json.loads((BENCH / "results/crash_peer.json").read_text(encoding="utf-8"))["sides"]
    for stage in sides["tunesmith"].values():
        outcomes = {point["outcome"] for point in stage["sweep"]["points"]}
        assert outcomes <= {"from step 4, bitwise the same", "from step 6, bitwise the same"}
    flips = sides["tunesmith"]["zero2"]["flips"]["found"]
    assert [flip["outcome"] for flip in flips] == ["from step 4, bitwise the same"] * 100
    assert not any(one["ran"] for one in sides["tunesmith"]["zero2"]["hostile_pickles"])
