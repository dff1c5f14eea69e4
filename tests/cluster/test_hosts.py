"""Trainings over several hosts: deepspeed --hostfile, torchrun, launch/hosts.py, and what follows when a link is cut.

The hosts are made on this machine (hosts.py). The losses are compared with those of one host with as many ranks.
"""

import importlib.util
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TRAIN = str(ROOT / "launch" / "train.py")
SHORT = ["+exp=debug", "evaluate.max_new_tokens=4", "evaluate.max_records=2"]
LONG = ["+exp=debug", "schedule.max_steps=400", "evaluate.every_steps=null", "checkpoint.every_steps=5"]
SECRET = "a-secret-that-nobody-sees"

spec = importlib.util.spec_from_file_location("tests_cluster_hosts", Path(__file__).with_name("hosts.py"))
assert spec is not None
assert spec.loader is not None
hosts_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hosts_module)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that each host has for itself."""
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, local: Path) -> Iterator[Any]:
    """n1 and n2."""
    if missing := hosts_module.what_is_missing():
        pytest.skip(f"no hosts with networks of their own: {missing}")
    made = hosts_module.Hosts(tmp_path_factory.mktemp("hosts"), local=[local])
    yield made
    made.close()


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of who starts a run on a host."""
    home = tmp_path_factory.mktemp("home")
    return {
        "PATH": f"{BIN}:{hosts_module.SYSTEM_PATH}",
        "HOME": str(home),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(home / "extensions"),
    }


ports = itertools.count(29600)


@pytest.fixture
def port() -> str:
    """The hosts have networks of their own: no other program is there, only what a test before may have left."""
    return str(next(ports))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    return tmp_path


def rows(run_dir: Path) -> dict[int, float]:
    """step -> training loss."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["train/loss"] for row in found if "train/loss" in row}


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["status"]


def deepspeed(port: str, *overrides: str, hosts: bool = True) -> list[str]:
    where = ["--hostfile", "hosts"] if hosts else ["--num_gpus", "4"]
    return ["deepspeed", *where, "--master_port", port, TRAIN, *overrides]


@pytest.fixture(scope="module")
def one_host(hosts: Any, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of four ranks on one host, ZeRO 2."""
    folder = tmp_path_factory.mktemp("one")
    code, said = hosts.run("n1", deepspeed("29590", *SHORT, "output_dir=run", hosts=False), folder, env, 400)
    assert code == 0, said
    return rows(folder / "run")


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeed_with_a_hostfile_has_the_losses_of_one_host(
    zero: str, hosts: Any, env: dict[str, str], folder: Path, port: str, one_host: dict[int, float]
) -> None:
    code, said = hosts.run("n1", deepspeed(port, *SHORT, f"engine={zero}", "output_dir=run"), folder, env, 400)
    assert code == 0, said
    assert status(folder / "run") == "finished"
    assert re.search(r"nodes +n1, n2; all-reduce of 4 MiB over 4 ranks at [\d.]+ GB/s", said)
    assert len(one_host) == 6
    assert rows(folder / "run") == pytest.approx(one_host, rel=0, abs=1e-6)
    print("largest difference:", max(abs(rows(folder / "run")[step] - loss) for step, loss in one_host.items()))


def torchrun(hosts: Any, port: str, *overrides: str) -> list[str]:
    where = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", port]
    return ["torchrun", *where, "--rdzv-endpoint", f"{hosts.address('n1')}:{port}", *overrides]


def test_torchrun_meets_over_c10d_and_has_the_losses_of_one_host(
    hosts: Any, env: dict[str, str], folder: Path, port: str, one_host: dict[int, float]
) -> None:
    command = torchrun(hosts, port, TRAIN, *SHORT, "output_dir=run")
    with hosts.running("n2", command, folder, env):
        code, said = hosts.run("n1", command, folder, env, 400)
    assert code == 0, said
    assert status(folder / "run") == "finished"
    assert rows(folder / "run") == pytest.approx(one_host, rel=0, abs=1e-6)


def test_another_code_on_one_host_is_refused_by_name(
    hosts: Any, env: dict[str, str], folder: Path, port: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for name in ("train", "kernels", "launch", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tunesmith", copy / "tunesmith", symlinks=True)
    loop = copy / "train" / "run" / "loop.py"
    loop.write_text(loop.read_text() + "# another version\n")
    run = [*SHORT, "output_dir=run"]
    theirs = torchrun(hosts, port, str(copy / "launch" / "train.py"), *run)
    with hosts.running("n2", theirs, folder, env | {"PYTHONPATH": str(copy)}):
        code, said = hosts.run("n1", torchrun(hosts, port, TRAIN, *run), folder, env, 400)
    assert code != 0
    [line] = [line for line in said.splitlines() if line.startswith("TrainingError")]
    assert line.startswith(f"TrainingError: node n2: it has other code of Tunesmith, at {copy}, which is ")
    assert not (folder / "run").exists()


def test_run_folders_on_local_disks_are_refused_with_the_remedy(
    hosts: Any, env: dict[str, str], folder: Path, port: str, local: Path
) -> None:
    code, said = hosts.run("n1", deepspeed(port, *SHORT, f"output_dir={local}/run"), folder, env, 400)
    assert code == 2, said
    assert f"TrainingError: {local}/run is not shared: only the node that has written there sees it." in said
    assert "do: set output_dir to a folder on a file system that all nodes mount" in said
    assert list(hosts.folder.glob(f"local/*{local}/run")) == []


def test_a_cut_link_names_the_node_ends_all_ranks_and_the_same_command_goes_on(
    hosts: Any, env: dict[str, str], folder: Path, port: str
) -> None:
    command = deepspeed(port, *LONG, "cluster.timeout_minutes=0.25", "output_dir=run")
    run = hosts.start("n1", command, folder, env)
    wait_for(lambda: len(rows(folder / "run")) >= 12, 300, "12 steps")
    hosts.link("n2", "down")
    cut = time.monotonic()
    try:
        said, _ = run.communicate(timeout=90)
        ended = time.monotonic() - cut
        wait_for(lambda: not hosts.processes("n2", TRAIN), 60, "the end of the ranks that were cut off")
        print(f"n1 ended {ended:.0f} s after the cut, n2 {time.monotonic() - cut:.0f} s")
    finally:
        hosts.link("n2", "up")
    assert run.returncode not in (0, 75)
    lines = [line for line in said.splitlines() if "last heard of" in line]
    assert len(lines) == 1, said  # from n1; n2's cannot come through
    assert re.match(r"n1: rank [23] of 4 on n2 was last heard of \d+ s ago, at step \d+, in .*: its node, or", lines[0])
    assert not hosts.processes("n1", TRAIN)
    assert ended < 60  # of 15 s for the step, and what ssh takes to give up
    assert status(folder / "run") == "failed"
    assert json.loads((folder / "run" / "failure.json").read_text())["kind"] == "lost"
    before = rows(folder / "run")
    newest = max(int(path.name.removeprefix("step-")) for path in (folder / "run" / "checkpoints").glob("step-*[0-9]"))
    assert max(before) - newest <= 5 + 1

    run = hosts.start("n1", command, folder, env)
    wait_for(lambda: max(rows(folder / "run")) >= max(before) + 3, 300, "three more steps")
    hosts.signal("n1", f"{TRAIN} --local_rank=0", "TERM")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 75, said
    assert f"from {folder}/run/checkpoints/step-{newest:06d}, step {newest}" in said
    after = rows(folder / "run")
    assert {step: after[step] for step in before} == before  # bitwise, also those that were done twice


def hosts_command(port: str, *overrides: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "launch" / "hosts.py"),
        "cluster.hostfile=hosts",
        f"--master-port={port}",
        *overrides,
    ]


ODD = "l'été (1), a=b $HOME"  # a run folder that a shell would read


def test_hosts_py_stops_together_hides_secrets_and_goes_on_from_there(
    hosts: Any, env: dict[str, str], folder: Path, port: str
) -> None:
    hostile = 'name="it is $(touch canary) `touch canary`; touch canary"'
    command = hosts_command(port, *LONG, f"output_dir={ODD}", hostile)
    run = hosts.start("n1", command, folder, env | {"WANDB_API_KEY": SECRET})
    starts = folder / ODD
    wait_for(lambda: list(starts.glob(".tunesmith-start-*/rank-*.json")), 120, "a rank that has its arguments")
    lines = [line for name in hosts.names for line in hosts.processes(name, "python")]
    assert any("--start" in line for line in lines)
    assert not [line for line in lines if SECRET in line]
    wait_for(lambda: len(rows(folder / ODD)) >= 3, 300, "3 steps")
    assert not list(starts.glob(".tunesmith-start-*/start.json"))  # all ranks have read it
    hosts.signal("n1", "launch/hosts.py", "INT")  # Ctrl-C
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 75, said
    assert status(folder / ODD) == "stopped"
    assert list(starts.glob(".tunesmith-start-*")) == []
    assert not list(folder.rglob("canary"))
    kept = [path for path in folder.rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")]
    assert (kept, SECRET in said) == ([], False)
    for name in hosts.names:
        assert not hosts.processes(name, TRAIN)
    stopped_at = max(rows(folder / ODD))

    run = hosts.start("n1", command, folder, env)
    wait_for(lambda: max(rows(folder / ODD)) > stopped_at, 300, "a step more")
    hosts.signal("n1", "launch/hosts.py", "TERM")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 75, said
    assert f"step {stopped_at}" in said


def test_ranks_do_not_wait_for_a_host_whose_ranks_died_before_they_met(
    hosts: Any, env: dict[str, str], folder: Path, port: str
) -> None:
    run = hosts.start("n1", hosts_command(port, *LONG, "output_dir=run"), folder, env)
    wait_for(lambda: len(list((folder / "run").glob(".tunesmith-start-*/rank-*.json"))) == 4, 200, "all ranks")
    hosts.signal("n2", str(folder), "KILL")  # the ranks, their launcher and the shell that ssh has started
    died = time.monotonic()
    said, _ = run.communicate(timeout=150)
    assert time.monotonic() - died < 120  # cluster.start_timeout_minutes is 30
    assert run.returncode not in (0, 75), said
    assert not hosts.processes("n1", TRAIN)
    assert list((folder / "run").glob("*")) == []


def test_hosts_py_names_the_host_that_is_not_fit_before_any_rank_starts(
    hosts: Any, env: dict[str, str], folder: Path, port: str, local: Path
) -> None:
    def refused(*overrides: str, **more: str) -> str:
        code, said = hosts.run("n1", hosts_command(port, *SHORT, *overrides), folder, env | more, 60)
        assert code == 2, said
        assert not (folder / "run").exists()
        return said

    (folder / "hosts").write_text("n1 slots=2\nn9 slots=2\n")
    said = refused("output_dir=run")
    assert "TrainingError: node n9 cannot be reached with ssh: " in said
    assert f"at: {folder}/hosts:2\n" in said

    (folder / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    other = hosts.folder / "local" / "n2" / str(local).lstrip("/") / "lib" / "transformers-5.22.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.22.0\n")
    said = refused("output_dir=run", PYTHONPATH=f"{local}/lib")
    assert "TrainingError: node n2: it has transformers 5.22.0, the others have " in said

    said = refused(f"output_dir={local}/run")
    assert f"TrainingError: {local}/run is not shared" in said


def test_a_slow_node_is_named_and_written_down(env: dict[str, str], tmp_path: Path, port: str) -> None:
    if missing := hosts_module.what_is_missing():
        pytest.skip(f"no hosts with networks of their own: {missing}")
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    (tmp_path / "made").mkdir()
    three = hosts_module.Hosts(tmp_path / "made", count=3)
    try:
        three.slow_down("n2", mbit=80)
        run = [*SHORT, "batch.global_batch_size=3", "cluster.min_bandwidth_gbps=0.05", "output_dir=run"]
        sick = {"TUNESMITH_SICK_NODES": str(tmp_path / "sick")}
        code, said = three.run("n1", hosts_command(port, *run), tmp_path, env | sick, 300)
    finally:
        three.close()
    assert code == 2, said
    [line] = [line for line in said.splitlines() if line.startswith("n1: TrainingError")]
    match = re.search(
        r"the network is slow: all-reduce of 4 MiB over 3 ranks at ([\d.]+) GB/s, and 0.05 are asked for", line
    )
    assert match, line
    assert float(match[1]) < 0.02  # 80 Mbit/s are 0.01 GB/s
    assert re.search(r"node n2: 0\.0\d+ GB/s at best with another node, the others have [\d.]+\.$", line), line
    [row] = [json.loads(text) for text in (tmp_path / "sick").read_text().splitlines()]
    assert row["node"] == "n2"
    assert not (tmp_path / "run").exists()
