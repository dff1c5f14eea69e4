"""Trains on the machines of a hostfile, reached with ssh.

    python launch/hosts.py +exp=support_bot cluster.hostfile=hosts key=value ...
    python launch/hosts.py --dry-run +exp=...      print the command that would run, and end

The hostfile has a line `name slots=8` for each machine. Each is checked first; then deepspeed starts the ranks
there, with these overrides and the variables that cluster.env lists. On Ctrl-C, SIGTERM or SIGUSR1 the ranks save, and
exit with 75.

Options:
    --dry-run              check the hostfile and the config, not the machines
    --master-port 29500    of the first machine, where the ranks meet
    --config-dir <folder>  search your own yaml files too, as in launch/train.py; all machines need to see it
"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.launch import start_file
from tunesmith.launch.arguments import main, sets, show_help, take_option
from tunesmith.launch.environment import chosen, without_secrets
from tunesmith.launch.host_run import HostRun, check_hosts
from tunesmith.launch.hostfile import Host, read_hostfile
from tunesmith.train.config.config import ClusterKind, Device
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import user_path
from tunesmith.train.ranks.stop import end

TRAIN = Path(__file__).resolve().parent / "train.py"
SET_BY_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")
DEEPSPEED_ENV = ".deepspeed_env"


@dataclass(frozen=True)
class HostLaunch:
    """What is to be started."""

    hosts: list[Host]
    hostfile: Path
    run_dir: Path
    arguments: list[str]  # of launch/train.py
    env: dict[str, str]  # that the ranks get
    master_port: str
    preflight: bool
    device: Device


def hosts(arguments: list[str]) -> None:
    if show_help(arguments, __doc__):
        return
    dry_run = "--dry-run" in arguments
    launch = prepare([argument for argument in arguments if argument != "--dry-run"], os.environ)
    for program in ("deepspeed", "pdsh", "ssh"):
        _program(program)
    if dry_run:
        path = launch.run_dir / f"{start_file.FOLDER}<random>" / start_file.FILE
        sys.stdout.write(
            f"{shlex.join(command(launch, path))}\n"
            f"  arguments in that file: {shlex.join(launch.arguments)}\n"
            f"  variables in that file: {' '.join(sorted(launch.env)) or 'none'}\n"
        )
        return
    is_new = not launch.run_dir.exists()
    path = start_file.write(launch.run_dir, launch.arguments, launch.env)
    try:
        if launch.preflight:
            check_hosts(launch.hosts, launch.hostfile, launch.run_dir, path.parent, launch.device)
        code = HostRun(command(launch, path), environment(os.environ), launch.hosts, path).run()
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
        if is_new and launch.run_dir.is_dir() and not any(launch.run_dir.iterdir()):
            launch.run_dir.rmdir()
    end(code)


def prepare(arguments: list[str], env: Mapping[str, str]) -> HostLaunch:
    """From the command line; checks files, not machines. Raises ConfigError."""
    from tunesmith.train.config.compose import compose_config
    from tunesmith.train.config.override_text import override_of
    from tunesmith.train.files import run_folder

    port, rest = take_option(arguments, "--master-port")
    port = port or "29500"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{port} is no port.", at="--master-port", do="give a number from 1024 to 65535.")
    config_dir, overrides = take_option(rest, "--config-dir")
    own = None if config_dir is None else user_path(config_dir).absolute()
    if not any(sets(override, "cluster") for override in overrides):
        overrides = ["cluster=hostfile", *overrides]
    composed = compose_config(overrides, own)
    cluster = composed.config.cluster
    with composed.errors_located():
        if cluster.kind is not ClusterKind.hostfile:
            raise ConfigError(
                f"launch/hosts.py trains with cluster=hostfile, not {cluster.kind}.",
                key="cluster.kind",
                do="use launch/slurm.py for a SLURM cluster, and deepspeed launch/train.py for this machine.",
            )
        if cluster.hostfile is None:
            raise ConfigError("no hostfile is named.", key="cluster.hostfile", do="add cluster.hostfile=<file>.")
        hostfile = user_path(cluster.hostfile).absolute()
        found = read_hostfile(hostfile)
        run_dir = run_folder.choose(composed.config)
        run_folder.check_usable(run_dir, composed.config.resume.source)
        for path in (Path.cwd(), TRAIN, Path(sys.executable)):
            if not start_file.PLAIN.fullmatch(str(path)):
                raise _not_plain(str(path), "the path")
        if not start_file.PLAIN.fullmatch(env.get("PYTHONPATH", "-")):
            raise _not_plain(env["PYTHONPATH"], "PYTHONPATH")
        variables = chosen(cluster.env, env)
    for name in SET_BY_THE_LAUNCHER:
        variables.pop(name, None)
    kept = [override for override in overrides if not sets(override, "output_dir")]
    sent = [*(["--config-dir", str(own)] if own else []), *kept, override_of("output_dir", run_dir)]
    return HostLaunch(found, hostfile, run_dir, sent, variables, port, cluster.preflight, cluster.device)


def _not_plain(text: str, what: str) -> ConfigError:
    return ConfigError(
        f"{text!r} has characters that deepspeed does not pass on to another machine unchanged.",
        at=what,
        do="use a folder of letters, digits and _ . - +.",
    )


def command(launch: HostLaunch, start: Path) -> list[str]:
    """What starts the ranks. --force_multi: deepspeed takes a single host for this one, whatever its name."""
    options = ["--hostfile", str(launch.hostfile), "--force_multi", "--master_port", launch.master_port]
    return [_program("deepspeed"), *options, str(TRAIN), "--start", start_file.as_word(start)]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of deepspeed itself, without the variables that it would put on command lines of ssh.

    The ranks get those from the start file. ~/.deepspeed_env, which would go the same way, is not read.
    """
    if any((folder / DEEPSPEED_ENV).is_file() for folder in (Path.home(), Path.cwd())):
        sys.stderr.write(f"hosts: {DEEPSPEED_ENV} is not read: cluster.env lists what the ranks get\n")
    return without_secrets(env) | {"DS_ENV_FILE": f"{DEEPSPEED_ENV}-of-nobody"}


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"there is no program {name!r}.", at="PATH", do=f"install it: apt-get install {name}.")
    return found


if __name__ == "__main__":
    os.environ.pop("RANK", None)  # this is no rank
    main(hosts)
