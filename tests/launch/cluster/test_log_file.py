"""Lines of files that are written meanwhile."""

import tracemalloc

import pytest

from tunesmith.launch.cluster import log_file
from tunesmith.launch.cluster.log_file import LogFile, start_of_last_lines


def read_all(file: LogFile) -> bytes:
    blocks = []
    while block := file.read():
        blocks.append(block)
    return b"".join(blocks)


def test_a_line_is_shown_once_it_is_whole(tmp_path):
    path = tmp_path / "log"
    file = LogFile(path, "[3] ")
    assert file.read() == b""  # it may come later
    with path.open("ab", buffering=0) as log:
        log.write(b"one\ntw")
        assert read_all(file) == b"[3] one\n"
        assert read_all(file) == b""
        log.write(b"o\n\nthree")
        assert read_all(file) == b"[3] two\n[3] \n"
    assert file.rest() == b"[3] three\n"
    assert file.rest() == b""


def test_of_a_progress_bar_the_last_state_is_shown(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"10%\r50%\r100%\r\nplain\r\nend\rof it\n")
    assert read_all(LogFile(path, "")) == b"100%\nplain\nof it\n"


def test_bytes_that_are_no_text_arrive_as_they_are(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"\xff\xfe\x00 \xc3\xa9\n")
    assert read_all(LogFile(path, "[0] ")) == b"[0] \xff\xfe\x00 \xc3\xa9\n"


def test_a_file_that_is_written_anew_is_read_from_its_start(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"a long first line\nand a torn")
    file = LogFile(path, "")
    assert read_all(file) == b"a long first line\n"
    path.write_bytes(b"new\n")
    assert read_all(file) == b"new\n"


@pytest.mark.parametrize("ending", [b"\n", b""])
@pytest.mark.parametrize("num_lines", [0, 1, 2, 7, 200])
@pytest.mark.parametrize("last_lines", [0, 1, 3, 200, 1000])
def test_the_last_lines(tmp_path, monkeypatch, num_lines, last_lines, ending):
    monkeypatch.setattr(log_file, "BLOCK_BYTES", 16)  # many blocks, with breaks at their edges
    lines = [f"line {number}".encode() * (number % 4) for number in range(num_lines)]
    lines[-1:] = [b"the last"] * bool(lines)
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(lines) + (ending if num_lines else b""))
    shown = path.read_bytes()[start_of_last_lines(path, last_lines) :]
    expected = b"\n".join(lines[-last_lines:] if last_lines else []) + (ending if num_lines and last_lines else b"")
    assert shown == expected


def test_memory_is_bounded_for_long_files_and_for_long_lines(tmp_path):
    path = tmp_path / "log"
    with path.open("wb") as log:
        for _ in range(200):
            log.write(b"x" * 100_000 + b"\n" + b"short\n" * 1000)
        log.write(b"y" * 10_000_000)
    tracemalloc.start()
    num_bytes = 0
    file = LogFile(path, "[0] ")
    while block := file.read():
        num_bytes += len(block)
    num_bytes += len(file.rest())
    assert start_of_last_lines(path, 1) == path.stat().st_size - 10_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes >= path.stat().st_size
    assert peak < 4_000_000, peak
