"""A build lock that nobody holds goes; one that somebody holds, or may hold on another machine, stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.train.errors import TrainingError
from tunesmith.train.watch import stale_locks
from tunesmith.train.watch.stale_locks import clear_stale_locks, extensions_folder, file_system


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "py311_cpu/cpu_adam/lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


@pytest.mark.row(26)
def test_a_lock_that_a_killed_build_left_is_removed_with_one_line(lock: Path, tmp_path: Path) -> None:
    flat = tmp_path / "deepspeed_shm_comm/lock"  # where TORCH_EXTENSIONS_DIR is set
    flat.parent.mkdir()
    flat.touch()
    warnings: list[str] = []
    clear_stale_locks(tmp_path, warnings.append)
    assert not lock.exists()
    assert not flat.exists()
    assert sorted(warnings) == sorted(
        f"removed {path}, left behind by a build that was killed." for path in (lock, flat)
    )


def test_a_lock_that_torch_holds_in_another_process_stays(lock: Path, tmp_path: Path) -> None:
    lock.unlink()
    code = (
        "import sys, time; from torch.utils.file_baton import FileBaton; "
        f"baton = FileBaton({str(lock)!r}); print(baton.try_acquire(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline().strip() == "True"
        clear_stale_locks(tmp_path, pytest.fail)
        assert lock.exists()
        builder.kill()
        builder.wait()
    warnings: list[str] = []
    clear_stale_locks(tmp_path, warnings.append)
    assert not lock.exists()
    assert len(warnings) == 1


def test_a_lock_on_a_shared_disk_is_named_and_not_removed(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale_locks, "file_system", lambda path: "nfs4")  # none can be mounted here
    usual = stale_locks.WAIT_SECONDS
    monkeypatch.setattr(stale_locks, "WAIT_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(TrainingError) as caught:
        clear_stale_locks(tmp_path, pytest.fail)
    assert time.monotonic() - started < usual
    assert caught.value.at == str(lock)
    assert "remove this file" in str(caught.value.do)
    assert lock.exists()
    assert not stale_locks.is_open(lock)


def test_waiting_for_a_shared_lock_stays_below_thirty_seconds() -> None:
    assert stale_locks.WAIT_SECONDS < 30


def test_no_folder_is_no_problem(tmp_path: Path) -> None:
    clear_stale_locks(tmp_path / "none", pytest.fail)


def test_the_file_system_is_the_one_of_the_innermost_mount() -> None:
    assert file_system(Path("/proc/self/status")) == "proc"
    assert file_system(Path("/dev/shm")) in ("tmpfs", "devtmpfs", "overlay")


def test_the_folder_is_torchs_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert extensions_folder() == Path(get_default_build_root())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
