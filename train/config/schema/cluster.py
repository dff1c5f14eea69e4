"""The machines of a run: how long its ranks may take, where they are, and what a scheduler is asked for."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from tunesmith.train.config.schema.checks import check_no_empty_text, check_not_negative, check_positive, check_strings
from tunesmith.train.errors import ConfigError

MAX_TIMEOUT_MINUTES = 60.0 * 24 * 365  # a year: beyond any wait, within what a timedelta holds
# The shapes that SLURM itself gives these values, so that none can be an option or a second line of the script.
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@+-]*(,[A-Za-z0-9_][A-Za-z0-9_.:@+-]*)*")
CONSTRAINT = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.:@+&|*()\[\],-]*")
MEMORY = re.compile(r"\d+[KMGT]?")
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
NODE_LIST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(\[[0-9,-]+\])?[A-Za-z0-9_.-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?|[A-Za-z_][A-Za-z0-9_]*=[^\x00-\x1f\x7f]*")
MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/=-]*")
SBATCH_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.:@+&|*()\[\],/=-]+)?")
NOT_FOR_USERS = frozenset(  # options of sbatch that cluster.* or the driver set, or that make a different job of it
    """array chdir cpus-per-task error exclude export export-file get-user-env gid gpus-per-node help het-group
    job-name mem nodes no-requeue ntasks ntasks-per-node open-mode output parsable requeue signal test-only time uid
    usage version wait wrap""".split()  # noqa: SIM905
)
MAX_WORD = 500  # characters
MIN_SIGNAL_SECONDS, MAX_SIGNAL_SECONDS = 60, 65535  # SLURM looks every 30 s, and holds the number in 16 bits


class Device(StrEnum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class ClusterKind(StrEnum):
    local = "local"
    hostfile = "hostfile"
    slurm = "slurm"


class ContainerRuntime(StrEnum):
    apptainer = "apptainer"
    enroot = "enroot"


@dataclass(kw_only=True)
class WatchConfig:
    """How long ranks may take."""

    device: Device = Device.auto  # auto: GPUs where there are any; cuda; cpu
    timeout_minutes: float = 10.0  # a rank stuck for longer in a step or in a batch of an evaluation ends the run
    start_timeout_minutes: float = 30.0  # the same while ranks connect, load and do their first step, which compiles
    save_timeout_minutes: float = 30.0  # the same while a checkpoint or the model is written or read back
    time_limit_minutes: float | None = None  # of the process: it saves and stops in time before; null: no limit
    check_replicas_every: int | None = None  # steps between two comparisons of the ranks' weights; null: never

    def _check_times(self) -> None:
        check_positive(
            "cluster", check_replicas_every=self.check_replicas_every, time_limit_minutes=self.time_limit_minutes
        )
        timeouts = {
            "timeout_minutes": self.timeout_minutes,
            "start_timeout_minutes": self.start_timeout_minutes,
            "save_timeout_minutes": self.save_timeout_minutes,
        }
        check_positive("cluster", **timeouts)
        for name, minutes in timeouts.items():
            if minutes > MAX_TIMEOUT_MINUTES:
                raise ConfigError(
                    f"{name}={minutes:g} is more than a year.",
                    key=f"cluster.{name}",
                    do="give the minutes after which a silent rank counts as lost, such as 10.",
                )


@dataclass(kw_only=True)
class NodesConfig:
    """Which machines, and what their ranks get from the machine that starts them."""

    kind: ClusterKind = ClusterKind.local  # local: this machine; hostfile: launch/hosts.py; slurm: launch/slurm.py
    nodes: int = 1  # machines
    gpus_per_node: int | None = None  # GPUs asked for on each machine; null: none
    tasks_per_node: int | None = None  # ranks on each machine; null: one for each GPU, or one
    hostfile: str | None = None  # `host slots=8` lines, as deepspeed reads them
    env: list[str] = field(default_factory=list)  # variables that the ranks inherit: a name, PREFIX_*, or NAME=value
    preflight: bool = True  # check each machine before the ranks train: code, versions, folder, GPUs, clock, space
    min_bandwidth_gbps: float | None = None  # of an all-reduce between machines, in 10^9 bytes a second; null: any

    def _check_nodes(self) -> None:
        check_positive(
            "cluster",
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            tasks_per_node=self.tasks_per_node,
            min_bandwidth_gbps=self.min_bandwidth_gbps,
        )
        _check_each("env", self.env, VARIABLE, "a variable", "write a name, a prefix such as NCCL_*, or NAME=value.")

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass(kw_only=True)
class JobConfig:
    """What SLURM is asked for."""

    partition: str | None = None  # SLURM partition, or several with commas; null: the cluster's default
    account: str | None = None  # SLURM account that is charged
    qos: str | None = None  # SLURM quality of service
    constraint: str | None = None  # features that the nodes must have, such as h100&ib
    reservation: str | None = None  # SLURM reservation
    time: str | None = None  # of one job: minutes, HH:MM:SS or D-HH:MM:SS; null: the partition's limit
    cpus_per_task: int | None = None  # CPUs of each rank; null: the cluster's default
    cpu_bind: str = "cores"  # how srun binds ranks to CPUs: cores, sockets, none, ...
    memory: str | None = None  # of each node, such as 200G; 0: all of it; null: the cluster's default
    exclude: list[str] = field(default_factory=list)  # nodes that are not used
    modules: list[str] = field(default_factory=list)  # environment modules to load, such as cuda/12.8
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, such as ['--switches=1']
    container: str | None = None  # image in which the ranks run; null: none
    container_runtime: ContainerRuntime = ContainerRuntime.apptainer  # apptainer; enroot (srun's --container-image)
    container_mounts: list[str] = field(default_factory=list)  # folders mounted in it, besides code and run: a or a:b
    container_python: str = "python3"  # the Python inside the image, with Tunesmith's dependencies
    signal_seconds: int = 300  # seconds before its time limit that the job is told to save
    max_restarts: int = 100  # of one job in total: after a time limit, a preemption, a crash
    no_progress: int = 3  # restarts in a row without a newer checkpoint, after which the job gives up

    def _check_job(self) -> None:
        check_positive("cluster", cpus_per_task=self.cpus_per_task, no_progress=self.no_progress)
        check_not_negative("cluster", max_restarts=self.max_restarts)
        words = {name: getattr(self, name) for name in ("partition", "account", "qos", "reservation", "cpu_bind")}
        for name, value in words.items():
            _check_shape(name, value, WORD, "use letters, digits and _ . : @ + -.")
        _check_shape("constraint", self.constraint, CONSTRAINT, "write features joined by & or |.")
        _check_shape("memory", self.memory, MEMORY, "write a number with K, M, G or T, such as 200G.")
        _check_shape("time", self.time, TIME, "write minutes, HH:MM:SS or D-HH:MM:SS.")
        _check_each("exclude", self.exclude, NODE_LIST, "a node", "write names such as n1 or gpu[01-04].")
        _check_each("modules", self.modules, MODULE, "a module", "write names such as cuda/12.8.")
        _check_each("sbatch", self.sbatch, SBATCH_OPTION, "an option of sbatch", "write it as --name or --name=value.")
        for option in self.sbatch:
            if option.removeprefix("--").partition("=")[0] in NOT_FOR_USERS:
                raise ConfigError(
                    f"{option} is not for cluster.sbatch: Tunesmith sets it.",
                    key="cluster.sbatch",
                    do="use the settings of cluster, such as cluster.time; for arrays launch/sweep.py.",
                )
        if self.time is not None and seconds_of(self.time) < self.signal_seconds + MIN_SIGNAL_SECONDS:
            raise ConfigError(
                f"time={self.time} leaves no time to train: the ranks are told to save {self.signal_seconds} s before "
                "its end, and up to 60 s earlier.",
                key="cluster.time",
                do=f"give at least {self.signal_seconds + MIN_SIGNAL_SECONDS} s, or less cluster.signal_seconds.",
            )
        check_strings("cluster.container_mounts", self.container_mounts, what="folder")
        if not MIN_SIGNAL_SECONDS <= self.signal_seconds <= MAX_SIGNAL_SECONDS:
            raise ConfigError(
                f"signal_seconds={self.signal_seconds} is not between {MIN_SIGNAL_SECONDS} and {MAX_SIGNAL_SECONDS}.",
                key="cluster.signal_seconds",
                do="give the seconds that a save takes plus a minute: SLURM looks at its clock every 30 s.",
            )


@dataclass(kw_only=True)
class ClusterConfig(JobConfig, NodesConfig, WatchConfig):
    """The machines the run is on."""

    def __post_init__(self) -> None:
        self._check_times()
        self._check_nodes()
        self._check_job()
        check_no_empty_text(self, "cluster.")


def seconds_of(time: str) -> int:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # minutes come first
    hours, minutes, seconds = (*parts, 0, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_shape(name: str, value: str | None, shape: re.Pattern[str], do: str) -> None:
    if value is not None and not (shape.fullmatch(value) and len(value) <= MAX_WORD):
        raise ConfigError(f"{name}={value!r} is not a value that SLURM takes.", key=f"cluster.{name}", do=do)


def _check_each(name: str, values: list[str], shape: re.Pattern[str], what: str, do: str) -> None:
    for value in values:
        is_long = isinstance(value, str) and len(value.partition("=")[0]) > MAX_WORD
        if not isinstance(value, str) or is_long or not shape.fullmatch(value):
            raise ConfigError(f"{value!r} in {name} is not {what}.", key=f"cluster.{name}", do=do)
