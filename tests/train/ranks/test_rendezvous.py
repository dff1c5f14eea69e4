"""Ranks that do not find each other: one message, that names who is missing."""

import re
import socket
import subprocess
import sys
import time

import pytest

from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.rendezvous import interruptible, meet


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free, "RANK": 0, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    return free


@pytest.mark.row(26)
def test_a_taken_port_is_one_message(port: int) -> None:
    with socket.create_server(("", port)):
        started = time.monotonic()
        with pytest.raises(TrainingError) as caught:
            meet(0, 4, 5, "gloo")
    assert time.monotonic() - started < 30
    assert caught.value.what == f"port {port} is taken by another program."
    assert "MASTER_PORT" in str(caught.value.do)


@pytest.mark.row(26)
@pytest.mark.slow
def test_ranks_that_do_not_come_are_named(port: int) -> None:
    code = "from tunesmith.train.ranks.rendezvous import meet; import sys; meet(2, 4, 0.12, 'gloo')"
    environment = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as two:
        with pytest.raises(TrainingError) as caught:
            meet(0, 4, 0.12, "gloo")
        said = two.communicate(timeout=60)[1]
    assert re.search(
        r"TrainingError: (2 of 4 ranks did not come .*: rank 1, 3\.|rank 0 ended while rank 2 waited)", said
    )
    assert caught.value.what == "2 of 4 ranks did not come within 0.12 minutes: rank 1, 3."


def test_a_node_without_a_gpu_among_others_that_have_one_is_named(port: int) -> None:
    code = "from tunesmith.train.ranks.rendezvous import meet; meet(1, 2, 0.5, 'gloo')"
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as one:
        with pytest.raises(TrainingError) as caught:
            meet(0, 2, 0.5, "nccl")
        assert one.wait(timeout=60) == 1
    host = socket.gethostname()
    assert caught.value.what == f"rank 1 on {host} sees no GPU, and rank 0 on {host} does."
    assert "cluster.device=cpu" in str(caught.value.do)


@pytest.mark.usefixtures("port")
def test_a_rank_0_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TrainingError, match=r"rank 1 could not reach rank 0 within 0\.03 minutes"):
        meet(1, 4, 0.03, "gloo")


def test_an_exception_comes_back_from_the_thread() -> None:
    assert interruptible(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
