"""What a node of a run is like, and which node is not like the others.

A node is looked at before its ranks start (launch/preflight.py) and again when they have met (node_checks.py).
Standard library only: on every node of a job this runs first, and it is not to take the seconds that torch takes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]  # the folder of train/, kernels/, launch/ and conf/
SICK_NODES = "TUNESMITH_SICK_NODES"  # environment: the file to which a run adds nodes that are not fit, as JSON lines
CODE_FOLDERS = ("conf", "kernels", "launch", "train")
# Another version of one of these can change the numbers, or end in a collective that only some ranks come to.
PACKAGES = (
    *("torch", "deepspeed", "transformers", "peft", "triton", "tokenizers", "safetensors", "numpy"),
    *("hydra-core", "omegaconf", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
NONCE_SECONDS = 10.0  # that a file written on one node may take to be seen on the others; NFS looks again after 3 to 60
MAX_CLOCK_SECONDS = 5.0  # apart: locks, logs and the times of files of several nodes are compared
RUN_BYTES = 256 * 2**20  # for metrics, the report and W&B's files; the model's own need is checked by rank 0
SHM_BYTES = 32 * 2**20  # NCCL takes about 10 MB for each pair of GPUs; Docker gives 64 MB by itself
TEMP_BYTES = 64 * 2**20
SMI_SECONDS = 30.0  # nvidia-smi waits for ever where a GPU has fallen off the bus


@dataclass(frozen=True)
class NodeFacts:
    """One node. Free space in bytes, clocks in seconds since 1970."""

    node: str
    code: str  # SHA-256 of Tunesmith's own files
    code_at: str
    python: str
    versions: dict[str, str]  # of PACKAGES that are installed
    gpus: int | None  # that the driver knows; None: there is no driver to ask
    gpus_given: int | None  # that CUDA_VISIBLE_DEVICES leaves; None: it is not set
    clock: float  # of this node, at a moment between the next two
    asked: float  # of the first node's clock
    answered: float
    free: dict[str, int]  # of the disks of the run folder, of /dev/shm and of temporary files
    sees_folder: bool  # what the first node has written beside the run is there
    write_problem: str = ""  # why nothing can be written there; empty: it can
    settings: dict[str, str] = field(default_factory=dict)  # of the run, where it is composed on each node

    @property
    def clock_ahead(self) -> float:
        """Seconds before the first node's clock, if the question took as long as the answer."""
        return self.clock - (self.asked + self.answered) / 2

    @property
    def clock_error(self) -> float:
        """Seconds by which clock_ahead may be wrong."""
        return max(0.0, self.answered - self.asked) / 2

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "NodeFacts":
        """Raises ValueError when the text is not one node's facts."""
        tree = json.loads(text)
        if not isinstance(tree, dict) or set(tree) != {item.name for item in fields(cls)}:
            raise ValueError("these are not the facts of a node")
        return cls(**tree)


@dataclass(frozen=True)
class Sick:
    """A node that is not to train, and why; an empty node: the reason is no node's own."""

    node: str
    reason: str
    do: str

    def __str__(self) -> str:
        return f"node {self.node}: {self.reason}" if self.node else self.reason


def node_name() -> str:
    """As the scheduler calls this node, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look(run_dir: Path, nonce_file: Path, nonce: str, *, asked: float = 0.0, answered: float = 0.0) -> NodeFacts:
    """The facts of this node. Waits NONCE_SECONDS at most for the nonce to be seen; leaves nothing behind.

    Args:
        run_dir: need not be there yet.
        nonce_file: that the first node has written, with nonce in it.
        asked, answered: of the first node's clock, where they are known.
    """
    clock = time.time()
    sees_folder = sees(nonce_file, nonce)
    place = existing(run_dir)
    return NodeFacts(
        node=node_name(),
        code=digest_of_code(CODE),
        code_at=str(CODE),
        python=platform.python_version(),
        versions=versions(),
        gpus=gpus_of_driver(),
        gpus_given=gpus_given(),
        clock=clock,
        asked=asked,
        answered=answered,
        free={"run": _free(place), "/dev/shm": _free(Path("/dev/shm")), "temp": _free(Path(tempfile.gettempdir()))},
        sees_folder=sees_folder,
        write_problem=_write_problem(place) if sees_folder else "",
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def sees(file: Path, content: str, seconds: float = NONCE_SECONDS) -> bool:
    """True as soon as the file has this content; False after the seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            os.listdir(file.parent)  # a network file system asks its server again about a folder that is opened
            if file.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def digest_of_code(root: Path) -> str:
    """SHA-256, in hex, over the names and contents of Tunesmith's Python files and yamls below root."""
    total = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") and path.is_file():
                content = path.read_bytes()
                total.update(f"{path.relative_to(root)}\0{len(content)}\0".encode())
                total.update(content)
    return total.hexdigest()


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpus_of_driver() -> int | None:
    """GPUs that answer the NVIDIA driver; 0 when it does not, None without a driver."""
    program, listed = shutil.which("nvidia-smi"), Path("/proc/driver/nvidia/gpus")
    if program is None:
        return len(list(listed.iterdir())) if listed.is_dir() else None
    try:
        said = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in said.stdout.splitlines())


def gpus_given() -> int | None:
    """GPUs that CUDA_VISIBLE_DEVICES leaves to the ranks; None when it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    return len([part for part in value.split(",") if part.strip() and part.strip() not in ("-1", "NoDevFiles")])


def _free(path: Path) -> int:
    """Bytes; 0 where there is no such place."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _write_problem(folder: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(prefix=".tunesmith-", dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def judge(
    facts: Sequence[NodeFacts], *, gpus: int | None, needed_bytes: int = RUN_BYTES, run_dir: str = "the run folder"
) -> list[Sick]:
    """The nodes that are not to train, each once, with the first reason found; in the order of facts.

    What most nodes have is right; where as many have one thing as another, the first node's.

    Args:
        facts: of all nodes, the first node's first.
        gpus: each node is to have at least so many; None: any number.
        needed_bytes: free on the disk of the run folder.
    """
    apart = [item for item in facts if not item.sees_folder]
    if apart and len(apart) >= len(facts) - 1:
        return [Sick("", f"{run_dir} is not shared: only the node that has written there sees it.", SHARE)]
    sick = [
        *(Sick(item.node, f"it does not see {run_dir}, which the others share.", MOUNT) for item in apart),
        *_differing(facts),
        *_wrong_clocks(facts),
        *_without_gpus(facts, gpus),
        *_without_space(facts, needed_bytes, run_dir),
    ]
    first = {item.node: item for item in reversed(sick)}
    names = ["", *(item.node for item in facts)]
    return [first[name] for name in dict.fromkeys(names) if name in first]


SHARE = "set output_dir to a folder on a file system that all nodes mount, such as your project's or home folder."
MOUNT = "mount that file system there, or leave the node out."
SAME = "install the same on all nodes (one virtual environment on a shared folder does), or leave the node out."


def _differing(facts: Sequence[NodeFacts]) -> Iterable[Sick]:
    yield from _odd(facts, "Python", [item.python for item in facts], SAME)
    for name in PACKAGES:
        yield from _odd(facts, name, [item.versions.get(name, "") for item in facts], SAME)
    codes = [item.code for item in facts]
    usual = _usual(codes)
    at = facts[codes.index(usual)].code_at
    for item in facts:
        if item.code != usual:
            where = f"{item.code_at}, which is {item.code[:12]}: the others have {usual[:12]}, at {at}"
            yield Sick(item.node, f"it has other code of Tunesmith, at {where}.", SAME)
    for key in dict.fromkeys(key for item in facts for key in item.settings):
        values = [item.settings.get(key, "") for item in facts]
        yield from _odd(facts, f"{key} =", values, "start the same command on all nodes.")


def _odd(facts: Sequence[NodeFacts], what: str, values: Sequence[str], do: str) -> Iterable[Sick]:
    usual = _usual(values)
    for item, value in zip(facts, values, strict=True):
        if value != usual:
            has = f"it has {what} {value}" if value else f"it has no {what}"
            yield Sick(item.node, f"{has}, the others have {usual or 'none'}.", do)


def _usual(values: Sequence[str]) -> str:
    """What most have; of several such, the one that comes first."""
    return Counter(values).most_common(1)[0][0]  # in the order of first sight where counts are equal


def _wrong_clocks(facts: Sequence[NodeFacts]) -> Iterable[Sick]:
    """Clocks that are apart by more than the exchange leaves open."""

    def apart(one: NodeFacts, other: NodeFacts) -> float:
        return abs(one.clock_ahead - other.clock_ahead) - one.clock_error - other.clock_error

    agreeing = [sum(apart(item, other) <= MAX_CLOCK_SECONDS for other in facts) for item in facts]
    right = facts[agreeing.index(max(agreeing))]
    for item in facts:
        if apart(item, right) > MAX_CLOCK_SECONDS:
            ahead = item.clock_ahead - right.clock_ahead
            how = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {right.node}"
            yield Sick(item.node, f"its clock is {how}.", "set its clock (chrony or ntp), or leave the node out.")


def _without_gpus(facts: Sequence[NodeFacts], gpus: int | None) -> Iterable[Sick]:
    a_driver = any(item.gpus is not None for item in facts)
    for item in facts:
        if gpus is None:
            continue
        do = "look at nvidia-smi and the kernel's log there, ask for fewer GPUs, or leave the node out."
        if a_driver and item.gpus is None:
            yield Sick(item.node, "it has no NVIDIA driver, other nodes have.", do)
            continue
        seen = [number for number in (item.gpus, item.gpus_given) if number is not None]
        if (usable := min(seen, default=0)) < gpus:
            yield Sick(item.node, f"{usable} of {gpus} GPUs are seen.", do)


def _without_space(facts: Sequence[NodeFacts], needed_bytes: int, run_dir: str) -> Iterable[Sick]:
    for problem in {item.write_problem for item in facts} - {""}:
        nodes = [item.node for item in facts if item.write_problem == problem]
        text = f"nothing can be written to {run_dir}: {problem}."
        yield from _of_all(nodes, facts, text, "choose another output_dir, or give the folder to this user.")
    needs = {"run": (needed_bytes, f"the disk of {run_dir}"), "/dev/shm": (SHM_BYTES, "/dev/shm")}
    needs["temp"] = (TEMP_BYTES, "the disk of temporary files (TMPDIR)")
    for key, (needed, place) in needs.items():
        for item in facts:
            if item.free[key] < needed:
                text = f"{place} has {item.free[key] / 2**20:.0f} MiB free, and {needed / 2**20:.0f} are needed."
                full = [other.node for other in facts if other.free[key] < needed]
                yield from _of_all(full if key == "run" else [item.node], facts, text, "free space there.")


def _of_all(nodes: Sequence[str], facts: Sequence[NodeFacts], reason: str, do: str) -> Iterable[Sick]:
    """What is wrong with the run folder everywhere is no node's fault."""
    if len(nodes) == len(facts):
        yield Sick("", reason, do)
    else:
        yield from (Sick(node, reason, do) for node in nodes)
