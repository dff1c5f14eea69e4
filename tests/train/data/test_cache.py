"""Prepared data: every byte is checked once a start and host; leftovers are removed, and what is at work is not."""

import os
import stat
import tempfile
import time

import pytest
from filelock import FileLock

from tunesmith.train.data import block_sums, cache
from tunesmith.train.data.cache import open_or_build

MIB = 2**20


def opened(root, content=b"x" * 12 * MIB, built=None):
    def build(folder):
        (folder / "train").mkdir()
        (folder / "train/weights.npy").write_bytes(content)
        if built is not None:
            built.append(1)

    return open_or_build(root, "name", lambda: ("key", build))


@pytest.mark.parametrize(("start", "size"), [(0, 1), (5 * MIB, MIB), (6 * MIB, 1), (12 * MIB - 1, 1)])
def test_a_damaged_byte_is_found_wherever_it_is(start, size, tmp_path):
    built = []
    path = opened(tmp_path, built=built) / "train/weights.npy"
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    assert opened(tmp_path, built=built).joinpath("train/weights.npy").read_bytes() == b"x" * 12 * MIB
    opened(tmp_path, built=built)
    assert len(built) == 2


@pytest.mark.parametrize("manifest", [b"", b"[]", b"5", b"{", b'{"train/weights.npy":[3]}', b'{"train/weights.npy":3}'])
def test_a_manifest_that_is_none_is_no_cache(manifest, tmp_path):
    built = []
    (opened(tmp_path, b"abc", built) / cache.MANIFEST).write_bytes(manifest)
    assert (opened(tmp_path, b"abc", built) / "train/weights.npy").read_bytes() == b"abc"
    assert len(built) == 2


def test_progress_tells_of_every_byte(tmp_path):
    counted = []

    class Counting:
        def __init__(self, total):
            counted.append(total)

        def __enter__(self):
            return lambda size: counted.append(-size)

        def __exit__(self, *error):
            pass

    opened(tmp_path)
    open_or_build(tmp_path, "name", lambda: ("key", None), Counting)
    assert counted[0] == 12 * MIB
    assert sum(counted) == 0
    assert len(counted) == 4


def on_two_ranks(rank, root, late=0.0, private=None):
    """What this rank has hashed (blocks) and built (folders), and when it began and ended.

    With a private folder the cache may only be read (tests may run as root, who may write anywhere).
    """
    counts = {"hashed": 0, "built": 0}
    crc, access = block_sums._crc, os.access
    if private:
        os.environ["XDG_RUNTIME_DIR"] = private
        os.access = lambda path, mode: False

    def counting(block):
        counts["hashed"] += 1
        return crc(block)

    def build(folder):
        time.sleep(0.3)
        (folder / "x").write_bytes(b"x" * 9 * MIB)
        counts["built"] += 1

    block_sums._crc = counting
    try:
        time.sleep(late if rank.world.rank == 0 else 0.0)
        counts["began"] = time.monotonic()
        folder = open_or_build(cache.Path(root), "name", lambda: ("key", build))
        assert (folder / "x").stat().st_size == 9 * MIB
    finally:
        block_sums._crc, os.access = crc, access
    return counts | {"ended": time.monotonic()}


def test_one_rank_of_a_host_builds_and_checks_and_the_others_believe_it(ranks, tmp_path):
    def start(late=0.0):
        first, second = ranks(2).run(on_two_ranks, root=str(tmp_path), late=late)
        assert second["ended"] > first["began"]  # what an earlier start has found is not believed
        return [(rank["hashed"], rank["built"]) for rank in (first, second)]

    assert start(late=0.5) == [(3, 1), (0, 0)]  # rank 0, although it comes last
    assert start() == start(late=0.5) == [(3, 0), (0, 0)]
    (tmp_path / "key/x").write_bytes(b"x" * 4 * MIB + b"y" + b"x" * (5 * MIB - 1))
    assert [built for _, built in start(late=0.5)] == [1, 0]


def test_a_rank_whose_first_rank_never_comes_works_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "HEAD_START_SECONDS", 0.1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (opened(tmp_path, b"abc") / "train/weights.npy").read_bytes() == b"abc"


OTHER_HOST = "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("host", "days", "is_building", "is_left"),
    [
        ("here", 0, False, False),  # killed
        ("here", 0, True, True),  # at work, as the lock of its key says
        (OTHER_HOST, 0, False, True),  # at work, maybe: some file systems show no host another's locks
        (OTHER_HOST, 30, False, False),
        (OTHER_HOST, 30, True, True),
    ],
)
def test_what_a_killed_builder_has_left_is_removed_and_nothing_else(host, days, is_building, is_left, tmp_path):
    folder = tmp_path / f".other.{cache._boot() if host == 'here' else host}.123.tmp"
    (folder / "train").mkdir(parents=True)
    then = time.time() - days * 86400
    os.utime(folder, (then, then))
    lock = FileLock(tmp_path / "other.lock")
    if is_building:
        lock.acquire()
    opened(tmp_path, b"abc")
    lock.release()
    assert folder.exists() is is_left
    opened(tmp_path, b"abc")  # which builds nothing: a hit removes them too
    assert folder.exists() is (host == OTHER_HOST and days == 0)


def test_marks_of_hosts_that_are_gone_are_removed(tmp_path):
    old, new = (tmp_path / f".name.{OTHER_HOST[:-1]}{number}.start" for number in (1, 2))
    for path, age in ((old, 30 * 86400), (new, 0)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    opened(tmp_path, b"abc")
    assert (old.exists(), new.exists()) == (False, True)


def test_one_rank_of_a_host_checks_a_cache_that_may_only_be_read(ranks, tmp_path, tmp_path_factory):
    pool, private = ranks(2), tmp_path_factory.mktemp("private")
    pool.run(on_two_ranks, root=str(tmp_path))
    for _ in range(2):  # what an earlier start has found is not believed
        found = pool.run(on_two_ranks, root=str(tmp_path), private=str(private), late=0.5)
        assert [(rank["hashed"], rank["built"]) for rank in found] == [(3, 0), (0, 0)]
    (folder,) = private.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == cache.OWNER_ONLY


@pytest.mark.parametrize("spoil", ["open", "link"])
def test_a_private_folder_that_others_may_have_made_is_not_believed(spoil, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "temp").mkdir()
    in_temp = tmp_path / f"temp/tunesmith-{os.getuid()}"
    folder = tmp_path / in_temp.name
    if spoil == "open":
        folder.mkdir()
        folder.chmod(0o770)
    else:
        (tmp_path / "other").mkdir(cache.OWNER_ONLY)
        folder.symlink_to("other")
    assert cache._start_path(tmp_path, "name").parent == in_temp
    in_temp.rmdir()
    in_temp.touch()
    assert cache._start_path(tmp_path, "name") is None


def test_a_cache_that_may_only_be_read_is_used(monkeypatch, tmp_path, tmp_path_factory):
    opened(tmp_path, b"abc")
    (tmp_path / f".name.{cache._boot()}.start").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("private")))
    assert (opened(tmp_path, b"abc") / "train/weights.npy").read_bytes() == b"abc"
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.lock"}
