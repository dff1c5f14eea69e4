"""Hosts on this machine that know nothing of each other but the network: for tests of runs on several nodes.

Each is a set of Linux namespaces with an address, a host name, processes, /dev/shm, /etc/hosts and an sshd of its own,
on a bridge that leads nowhere else. Files are common to all, as on a shared file system, but for the paths in `local`.
Needs root, iproute2, util-linux and openssh. Changes nothing outside of its folder but the bridge, until close().
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

PROGRAMS = ("unshare", "nsenter", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
PATIENCE = 60.0  # seconds that the start of a host, or the end of a process, may take
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Process 1 of a host. Its arguments: the folder, the name, the address, and the local paths.
INIT = r"""
set -eu
folder=$1 name=$2 address=$3
shift 3
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
for path in "$@"; do
    mkdir -p "$folder/local/$name$path" "$path"
    mount --bind "$folder/local/$name$path" "$path"
done
hostname "$name"
ip link set lo up
touch "$folder/$name.namespaces"
until ip address add "$address/24" dev eth0 2>/dev/null; do sleep 0.05; done
ip link set eth0 up
/usr/sbin/sshd -f "$folder/sshd_config" -E "$folder/$name.sshd.log"
touch "$folder/$name.up"
while true; do wait -n || sleep 1; done
"""

SSHD = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
UseDNS no
"""

SSH = """Host *
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking accept-new
    LogLevel ERROR
    ConnectTimeout 5
    ServerAliveInterval 2
    ServerAliveCountMax 3
"""


def what_is_missing() -> str:
    """Why there can be no hosts here; empty when there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if os.getuid() != 0 or subprocess.run(probe, capture_output=True, timeout=20, check=False).returncode != 0:
        return "no privilege to make namespaces"
    return ""


class Hosts:
    """The hosts n1, n2, ..., until close().

    Args:
        folder: an empty one, which all hosts see.
        local: folders that each host has for itself, empty at first.
    """

    def __init__(self, folder: Path, count: int = 2, *, local: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, count + 1)]
        self._bridge = f"tsm{secrets.token_hex(3)}"
        self._inits: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        try:
            self._subnet = self._make_bridge()
            self._write_files()
            for name in self.names:
                self._start(name, local)
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        return f"{self._subnet}.{10 + int(name[1:])}"

    def entered(self, name: str, cwd: Path) -> list[str]:
        """What to put before a command that is to run on a host, in the folder cwd."""
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return ["nsenter", "-t", str(self._inits[name][1]), *namespaces, "env", "-C", str(cwd)]

    def start(self, name: str, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> "subprocess.Popen[str]":
        """Starts a command on a host; both its outputs come through stdout."""
        return self._start_process(name, command, cwd, env, subprocess.PIPE)

    @contextlib.contextmanager
    def running(self, name: str, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> Iterator[None]:
        """Meanwhile a command runs on a host; it is to end within PATIENCE after. Its output goes to cwd/<name>.log."""
        with (cwd / f"{name}.log").open("w") as log:
            process = self._start_process(name, command, cwd, env, log)
            try:
                yield
                process.wait(PATIENCE)
            finally:
                process.kill()
                process.wait(PATIENCE)

    def _start_process(
        self, name: str, command: Sequence[str], cwd: Path, env: Mapping[str, str], out: int | IO[str]
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.entered(name, cwd), *command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(
        self, name: str, command: Sequence[str], cwd: Path, env: Mapping[str, str], seconds: float
    ) -> tuple[int, str]:
        """Exit code and output of a command on a host; what still runs after the seconds is killed."""
        process = self.start(name, command, cwd, env)
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            raise AssertionError(f"{command} did not end within {seconds:g} s:\n{said}") from None
        return process.returncode, said

    def processes(self, name: str, word: str) -> list[str]:
        """The command lines of a host's processes that contain a word."""
        listed = subprocess.run(
            [*self.entered(name, Path("/")), "ps", "-ww", "-eo", "pid,args"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return [line for line in listed.stdout.splitlines() if word in line]

    def signal(self, name: str, word: str, number: str) -> None:
        """Sends a signal to a host's processes whose command line contains a word; at least one must be there."""
        pids = [line.split()[0] for line in self.processes(name, word)]
        assert pids, f"no process of {name} has {word} in its command line"
        subprocess.run([*self.entered(name, Path("/")), "kill", f"-{number}", *pids], timeout=20, check=True)

    def link(self, name: str, state: str) -> None:
        """Pulls out a host's network cable (down) or plugs it in again (up)."""
        _ip("link", "set", f"{self._bridge}{name}", state)

    def slow_down(self, name: str, mbit: int) -> None:
        """From now on a host hears the others at no more than so many 10^6 bits a second."""
        limit = ["tbf", "rate", f"{mbit}mbit", "burst", "256k", "latency", "400ms"]
        command = ["tc", "qdisc", "add", "dev", f"{self._bridge}{name}", "root", *limit]
        subprocess.run(command, env={"PATH": SYSTEM_PATH}, timeout=20, check=True)

    def close(self) -> None:
        """Ends all hosts with all that runs on them."""
        for process, pid in self._inits.values():
            if pid:
                os.kill(pid, 9)
            process.kill()
            process.wait(timeout=10)
        self._inits.clear()
        for name in self.names:
            _ip("link", "delete", f"{self._bridge}{name}", check=False)
        _ip("link", "delete", self._bridge, check=False)

    def _make_bridge(self) -> str:
        """Makes the bridge, and returns the first three numbers of its addresses, which no other has."""
        _ip("link", "add", self._bridge, "type", "bridge")
        start = secrets.randbelow(250)
        for number in range(250):
            subnet = f"198.19.{(start + number) % 250 + 1}"
            if not _ip("-4", "address", "show", "to", f"{subnet}.0/24").strip():
                _ip("address", "add", f"{subnet}.1/24", "dev", self._bridge)
                _ip("link", "set", self._bridge, "up")
                return subnet
        raise AssertionError("no free network")

    def _write_files(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        for key in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(command, check=True, timeout=20, stdin=subprocess.DEVNULL)

    def _start(self, name: str, local: Sequence[Path]) -> None:
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]
        arguments = ["bash", "-c", INIT, "init", str(self.folder), name, self.address(name), *map(str, local)]
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                ["unshare", *namespaces, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": SYSTEM_PATH},  # what sshd gives to those who log in is not of this process
            )
        self._inits[name] = (process, 0)
        self._wait_for(self.folder / f"{name}.namespaces", process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._inits[name] = (process, int(children[0]))
        port = f"{self._bridge}{name}"
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", children[0])
        _ip("link", "set", port, "master", self._bridge, "up")
        self._wait_for(self.folder / f"{name}.up", process)

    def _wait_for(self, path: Path, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert process.poll() is None, path.with_suffix(".log").read_text()
            assert time.monotonic() < deadline, f"{path} does not come"
            time.sleep(0.02)


def _ip(*arguments: str, check: bool = True) -> str:
    program = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin") or "ip"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
