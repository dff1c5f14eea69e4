"""Ranks on the machines of a hostfile, from the pre-flight to the exit code."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO

from tunesmith.launch import preflight, start_file
from tunesmith.launch.hostfile import Host
from tunesmith.train.config.config import Device
from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.stop import SIGNALS
from tunesmith.train.watch.node_facts import NodeFacts, judge

# ssh would wait for hours for a host whose link is cut: it asks every 15 s, and gives up after a minute.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
SSH_AT_ONCE = 32  # connections that are opened at the same time
CHECK_SECONDS = 90.0  # for the pre-flight of a host; nvidia-smi alone may take 30
KILL_SECONDS = 30.0  # for a signal to reach a host
ABANDONED_SECONDS = 60.0  # after a host has ended with an error, for the others to notice by themselves
POLL_SECONDS = 0.2
ENDED = re.compile(rb"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)")


def check_hosts(hosts: Sequence[Host], hostfile: Path, run_dir: Path, folder: Path, device: Device) -> None:
    """The pre-flight of launch/preflight.py on each host. Raises TrainingError that names the unfit ones.

    Where one host has an NVIDIA driver, all need as many GPUs as the hostfile's fewest slots, unless device=cpu.
    """
    nonce = preflight.begin(folder / "preflight")
    command = preflight.command(folder / "preflight", run_dir, nonce)
    with ThreadPoolExecutor(SSH_AT_ONCE) as pool:
        facts = list(pool.map(lambda host: _check_host(host, hostfile, command), hosts))
    wants_gpus = device is Device.cuda or (device is Device.auto and any(item.gpus for item in facts))
    gpus = min(host.slots for host in hosts) if wants_gpus else None
    if sick := judge(facts, gpus=gpus, run_dir=str(run_dir)):
        raise TrainingError(" ".join(map(str, sick[:3])), at=str(hostfile), do=sick[0].do)


def _check_host(host: Host, hostfile: Path, command: Sequence[str]) -> NodeFacts:
    variables = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if os.environ.get("PYTHONPATH") else []
    there = shlex.join(["env", "-C", str(Path.cwd()), *variables, *command])
    asked = time.time()
    try:
        done = _ssh(host, there, CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        raise _unreachable(host, hostfile, f"no answer within {CHECK_SECONDS:g} s") from None
    found = preflight.printed(done.stdout)
    if found:
        return replace(found[0], node=host.name, asked=asked, answered=time.time())
    said = done.stderr.strip().splitlines()
    reason = said[-1][:200] if said else f"exit code {done.returncode}"
    if done.returncode == 255:  # ssh's own
        raise _unreachable(host, hostfile, reason)
    raise TrainingError(
        f"node {host.name} cannot run Tunesmith: {reason}",
        at=f"{hostfile}:{host.line}",
        do=f"make sure that {sys.executable} and {Path.cwd()} exist there, with Tunesmith installed.",
    )


def _unreachable(host: Host, hostfile: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"node {host.name} cannot be reached with ssh: {reason}",
        at=f"{hostfile}:{host.line}",
        do=f"make `ssh {host.name} true` work without a password, or remove the line.",
    )


def _ssh(host: Host, command: str, seconds: float) -> "subprocess.CompletedProcess[str]":
    ssh = ["ssh", *shlex.split(SSH_OPTIONS), host.name, command]
    return subprocess.run(
        ssh, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
    )


class HostRun:
    """The launcher's process, and the ranks that it has started.

    Signals go to the ranks, not to the launcher: deepspeed's would end every deepspeed run of this user on the hosts,
    and kill ranks that take more than 30 s to save.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], hosts: Sequence[Host], start: Path) -> None:
        self._hosts = hosts
        self._start = start
        self._asked: signal.Signals | None = None
        self._signalled: set[int] = set()  # ranks
        self._host_failed_at: float | None = None
        env = dict(env) | {"PDSH_SSH_ARGS_APPEND": f"{env.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()}
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self._process = subprocess.Popen(
            list(command),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        streams = [(self._process.stdout, sys.stdout.buffer), (self._process.stderr, sys.stderr.buffer)]
        self._pumps = [threading.Thread(target=self._pump, args=pair, daemon=True) for pair in streams]
        for pump in self._pumps:
            pump.start()

    def run(self) -> int:
        """Waits for the end; returns the highest exit code of the ranks, as pdsh gives it."""
        slots = sum(host.slots for host in self._hosts)
        while self._process.poll() is None:
            ranks = start_file.ranks_of(self._start)
            if len(ranks) >= slots and self._start.exists():
                self._start.unlink()  # it may hold secrets, and nobody needs it any more
            if self._asked:
                self._pass_on(self._asked, ranks)
            elif self._host_failed_at and time.monotonic() - self._host_failed_at > ABANDONED_SECONDS:
                self._pass_on(signal.SIGTERM, ranks)
            time.sleep(POLL_SECONDS)
        for pump in self._pumps:
            pump.join(5.0)
        return self._process.returncode if self._process.returncode >= 0 else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number)

    def _pass_on(self, number: signal.Signals, ranks: Mapping[int, start_file.RankProcess]) -> None:
        """Sends it to the ranks that have not had it yet; a later rank gets it once it has reported its start."""
        waiting = {rank: process for rank, process in ranks.items() if rank not in self._signalled}
        self._signalled |= set(waiting)
        of_hosts: dict[int, list[str]] = {}
        for process in waiting.values():
            of_hosts.setdefault(process.node_rank, []).append(str(process.pid))

        def tell(node_rank: int) -> None:
            words = ["kill", f"-{number.name.removeprefix('SIG')}", *of_hosts[node_rank]]
            with contextlib.suppress(subprocess.TimeoutExpired):
                _ssh(self._hosts[node_rank], shlex.join(words), KILL_SECONDS)

        if of_hosts:
            with ThreadPoolExecutor(SSH_AT_ONCE) as pool:
                list(pool.map(tell, of_hosts))

    def _pump(self, source: IO[bytes], target: IO[bytes]) -> None:
        for line in source:
            match = ENDED.match(line)
            if match and self._host_failed_at is None:
                self._host_failed_at = time.monotonic()
            with contextlib.suppress(OSError):
                target.write(line)
                target.flush()
