"""A real SLURM on this machine: nodes with addresses, host names and processes of their own, and common files.

slurm_cluster.sh says what it is, and what it is not: nothing enforces CPUs or memory, and a GPU is but a number.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "slurm_cluster.sh"
# A node that is gone is missed after 5 s, not after 14: SLURM counts these times about three times.
IMPATIENT = ("SlurmdTimeout=2", "MessageTimeout=2", "TCPTimeout=1")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
TEST_SECONDS = 600  # the first training of a session builds an extension: 40 s, or minutes on a busy machine
OVER = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(SCRIPT.parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


class Cluster:
    """A cluster that is up.

    Args:
        directory: a folder for it, of at most 72 characters.
        nodes: how many: n1, n2, ...
        conf: lines of slurm.conf, in place of those with the same key.
        options: of `slurm_cluster.sh up`.
    """

    def __init__(self, directory: Path, *options: str, nodes: int = 4, conf: tuple[str, ...] = ()) -> None:
        self.directory = directory
        lines = [part for line in (*IMPATIENT, *conf) for part in ("--conf", line)]
        self.verb("up", "--owner", str(os.getpid()), "--nodes", str(nodes), *lines, *options)
        # A test's own SLURM_* and WANDB_* would be taken for what is said here.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_", "RANK"))}
        self.env = kept | {"SLURM_CONF": str(directory / "etc/slurm.conf"), "LC_ALL": "C.UTF-8"}
        self.nodes = self.run("sinfo", "-h", "-N", "-o", "%N").splitlines()  # n1, n2, ...; else addresses

    @property
    def has_networks(self) -> bool:
        """Whether its nodes have networks of their own, which `link` and `exec` need, and root alone can make."""
        return 'MODE="netns"' in (self.directory / "slurm_cluster.settings").read_text()

    def verb(self, verb: str, *arguments: str) -> str:
        """slurm_cluster.sh VERB: crash n2, boot n2, link n2 down, exec n2 COMMAND...; see host()."""
        command = [str(SCRIPT), verb, "--dir", str(self.directory), *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def host(self, node: str) -> str:
        """What verb() calls a node of SLURM's: the same, but for nodes without networks, whose names are addresses."""
        return f"n{self.nodes.index(node) + 1}"

    def run(self, *command: str, timeout: float = 60, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
        """What a command on the login node prints; fails with what it said when it fails."""
        done = self.call(*command, timeout=timeout, env=env, cwd=cwd)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def call(
        self, *command: str, timeout: float = 60, env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node, however it ends."""
        return subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.env | (env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
        )

    def submit(self, script: Path, *options: str, env: dict[str, str] | None = None) -> str:
        """sbatch; the job's id."""
        return self.run("sbatch", "--parsable", *options, str(script), env=env).split(";")[0]

    def facts(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, NodeList, Restarts, ..."""
        words = self.run("scontrol", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, *states: str, timeout: float = 60, restarts: int = 0) -> dict[str, str]:
        """The job's facts once it is in one of the states, and has been restarted at least so many times.

        Fails when it ends in another one, or after timeout seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            facts = self.facts(job_id)
            if facts["JobState"] in states and int(facts["Restarts"]) >= restarts:
                return facts
            said = f"job {job_id}: {facts['JobState']} ({facts['Reason']}), restart {facts['Restarts']}"
            assert facts["JobState"] not in OVER - set(states), f"{said} instead of {states}"
            assert time.monotonic() < deadline, f"{said} instead of {states} after {timeout} s"
            time.sleep(0.2)

    def wait_for_node(self, node: str, *states: str, timeout: float = 30) -> None:
        """Until sinfo calls a node idle, alloc, mix, down, ...; with a star when it does not answer."""
        deadline = time.monotonic() + timeout
        while (state := self.run("sinfo", "-h", "-o", "%t", "-n", node)) not in states:
            assert time.monotonic() < deadline, f"{node} is {state} instead of {states} after {timeout} s"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """start_cluster("--accounting", nodes=2, conf=("KillWait=2",)) is a cluster of one's own, until the session ends.

    Skips where there is no SLURM; a cluster that does not come up is a failure.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: tests/cluster/install.sh installs SLURM, as root")
    started: list[Cluster] = []

    def start(*options: str, nodes: int = 4, conf: tuple[str, ...] = ()) -> Cluster:
        started.append(Cluster(tmp_path_factory.mktemp("slurm"), *options, nodes=nodes, conf=conf))
        return started[-1]

    yield start
    for cluster in started:
        cluster.verb("down")


@pytest.fixture(scope="session")
def slurm(start_cluster: Callable[..., Cluster]) -> Cluster:
    """The cluster that most tests share: n1 to n4. Who crashes a node boots it again."""
    return start_cluster()


@pytest.fixture(scope="session")
def training_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a training on the CPU, with DeepSpeed's extension built already, in a folder all nodes see.

    Built once: ranks on several nodes would build it at once, and cannot see whether a lock on it is another's.
    """
    home = tmp_path_factory.mktemp("home")
    env = {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # ninja lies beside python
        "TORCH_EXTENSIONS_DIR": str(home / "torch_extensions"),
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"
    done = subprocess.run(
        [sys.executable, "-c", build], env=os.environ | env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return env


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Path]:
    """make_job("srun hostname", "--nodes=2") is a batch script with these lines, whose output goes to tmp_path."""

    def make(text: str, *options: str, log: str = "slurm-%j.out") -> Path:
        number = len(list(tmp_path.glob("job-*.sh")))
        path = tmp_path / f"job-{number}.sh"
        head = [f"#SBATCH --output={tmp_path / log}", *[f"#SBATCH {option}" for option in options]]
        path.write_text("\n".join(["#!/bin/bash", *head, text, ""]), encoding="utf-8")
        return path

    return make
