"""What launch/hosts.py makes of a hostfile and a command line; tests/cluster/test_hosts.py runs it on hosts."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.launch import start_file
from tunesmith.launch.environment import chosen, without_secrets
from tunesmith.launch.hostfile import Host, read_hostfile
from tunesmith.launch.hosts import command, prepare
from tunesmith.train.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hosts"
    path.write_text("n1 slots=2\nn2 slots=2\n")
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text("# ours\n\nn1 slots=4\n  me@n2.example.com   slots=8  # the new one\n")
    assert read_hostfile(path) == [Host("n1", 4, 3), Host("me@n2.example.com", 8, 4)]
    assert dict(fetch_hostfile(str(path))) == {host.name: host.slots for host in read_hostfile(path)}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("n1 slots=2\nn2\n", 2, "'n2' is not a host"),
        ("n1 slots=2\nn2 slots=two\n", 2, "'n2 slots=two' is not a host"),
        ("n[1-4] slots=2\n", 1, "is not a host"),  # pdsh would make four of it
        ("n1,n2 slots=2\n", 1, "is not a host"),
        ("-oProxyCommand=touch slots=2\n", 1, "is not a host"),  # ssh would take it for an option
        ("$(touch canary) slots=2\n", 1, "is not a host"),
        ("n1 slots=2 extra\n", 1, "is not a host"),
        ("n1 slots=2\n\nn1 slots=4\n", 3, "n1 is in the hostfile twice, in line 1 too"),
        ("n1 slots=0\n", 1, "n1 has no slots"),
        ("# nothing\n\n", None, "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_hostfile(path)
    assert words in str(refused.value)
    assert f"at: {path}{f':{line}' if line else ''}\n" in str(refused.value)


def test_the_plan_names_one_run_folder_and_implies_the_cluster(hostfile: Path, tmp_path: Path) -> None:
    launch = prepare(
        ["+exp=debug", "cluster.hostfile=hosts", "cluster.env=[HF_*,'A=1 2']"], {"HF_HOME": "/hf", "B": "2"}
    )
    assert launch.run_dir.parent == tmp_path / "runs"
    assert launch.arguments == [
        "cluster=hostfile",
        "+exp=debug",
        "cluster.hostfile=hosts",
        "cluster.env=[HF_*,'A=1 2']",
        f"output_dir={launch.run_dir}",
    ]
    assert launch.env == {"HF_HOME": "/hf", "A": "1 2"}
    assert not launch.run_dir.exists()


def test_no_argument_and_no_variable_is_on_a_command_line(hostfile: Path) -> None:
    hostile = 'name="it is $(touch canary) `id`"'
    launch = prepare(
        ["+exp=debug", "cluster.hostfile=hosts", "output_dir=run", hostile], {"WANDB_API_KEY": "a-secret-key"}
    )
    assert hostile in launch.arguments
    assert launch.env == {"WANDB_API_KEY": "a-secret-key"}
    words = " ".join(command(launch, launch.run_dir / "start.json"))
    assert "canary" not in words
    assert "secret" not in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+exp=debug"], "no hostfile is named"),
        (["+exp=debug", "cluster.hostfile=absent"], "cannot be read: No such file"),
        (["+exp=debug", "cluster=local", "cluster.hostfile=hosts"], "not local"),
        (["+exp=debug", "cluster.hostfile=hosts", "--master-port=x"], "is no port"),
        (["+exp=debug", "cluster.hostfile=hosts", "seed=x"], "seed"),
    ],
)
def test_what_cannot_be_started_is_refused_before_any_host_is_asked(
    hostfile: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(arguments, {})
    assert words in str(refused.value)
    assert list(tmp_path.iterdir()) == [hostfile]


@pytest.mark.parametrize("name", ["plain", "l'été (1)", 'a "b" $HOME;`id`', "a=b,c [2]", "\udce9", "~x"])
def test_any_run_folder_reaches_the_ranks_through_a_shell(hostfile: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "start.json"
    word = start_file.as_word(path)
    assert start_file.PLAIN.fullmatch(word)
    assert start_file.from_word(word) == path
    assert (word == str(path)) == (name == "plain")
    if name.isprintable():
        launch = prepare(["+exp=debug", "cluster.hostfile=hosts", f"output_dir={name}"], {})
        assert launch.run_dir == tmp_path / name
        assert command(launch, path)[-2:] == ["--start", word]


def test_a_working_folder_that_deepspeed_does_not_pass_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/hosts").write_text("n1 slots=1\n")
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(ConfigError, match="does not pass on to another machine"):
        prepare(["+exp=debug", "cluster.hostfile=hosts"], {})


def test_a_dry_run_prints_the_command_and_leaves_nothing(hostfile: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "launch" / "hosts.py"), "--dry-run", "+exp=debug", "cluster.hostfile=hosts"]
    env = {**os.environ, "HF_TOKEN": "hf_not_to_be_seen"}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    if "there is no program 'pdsh'" in done.stderr:
        pytest.skip("pdsh is not installed")
    assert done.returncode == 0, done.stderr
    assert f"--hostfile {hostfile}" in done.stdout
    assert "HF_TOKEN" in done.stdout
    assert "not_to_be_seen" not in done.stdout
    assert list(tmp_path.iterdir()) == [hostfile]


def test_the_start_file_is_for_its_user_alone_and_says_exactly_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["name='a b'", 'x="$(touch canary)"', "y=a\nb"]
    path = start_file.write(tmp_path, arguments, {"HF_TOKEN": 'it\'s a "secret"\n'})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("HF_TOKEN", "another")
    assert start_file.take(path) == arguments
    assert os.environ["HF_TOKEN"] == 'it\'s a "secret"\n'
    assert start_file.ranks_of(path)[3].pid == os.getpid()


def test_variables_that_python_reads_itself_count_too(tmp_path: Path) -> None:
    path = start_file.write(tmp_path, ["a=1"], {"PYTHONHASHSEED": "7", "LD_LIBRARY_PATH": "/nowhere"})
    code = (
        "import sys; from pathlib import Path; from tunesmith.launch.start_file import take; "
        "print(take(Path(sys.argv[1])), hash('x'), sys.argv)"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONHASHSEED", "LD_LIBRARY_PATH")}
    said = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    seven = subprocess.run(
        [sys.executable, "-c", "print(hash('x'))"], env={**env, "PYTHONHASHSEED": "7"}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert f"['a=1'] {seven.stdout.strip()} " in said.stdout


def test_a_start_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = start_file.write(tmp_path, [], {})
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others could have written"):
        start_file.take(path)


def test_a_start_file_that_is_not_there_names_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_file, "WAIT_SECONDS", 0.2)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with pytest.raises(ConfigError, match="n7 does not see") as refused:
        start_file.take(tmp_path / "absent.json")
    assert "share" in str(refused.value)


def test_a_later_variable_counts_and_an_absent_one_is_not_made_up() -> None:
    env = {"NCCL_A": "1", "NCCL_B": "2", "OTHER": "3"}
    assert chosen(["NCCL_*", "NCCL_A=x=y", "ABSENT"], env) == {"NCCL_A": "x=y", "NCCL_B": "2"}
    assert chosen([], env) == {}


def test_what_deepspeed_puts_on_command_lines_is_taken_from_it() -> None:
    from deepspeed.launcher.runner import EXPORT_ENVS

    seen = {f"{name}_X": "1" for name in [*EXPORT_ENVS, "NCCL"]}
    secrets = {"MLFLOW_TRACKING_TOKEN": "t", "HF_TOKEN": "t", "WANDB_API_KEY": "k"}
    kept = {"PATH": "/bin", "HOME": "/root", "PYTHONPATH": "/code", "SSH_AUTH_SOCK": "/tmp/agent"}
    assert without_secrets({**seen, **secrets, **kept}) == kept


def test_a_rank_says_its_place_in_a_file_that_is_whole_or_not_there(tmp_path: Path) -> None:
    path = start_file.write(tmp_path, [], {})
    (path.parent / "rank-0.json").write_text("{")
    (path.parent / "rank-1.json").write_text(json.dumps({"node": "n1", "node_rank": 0, "pid": 7}))
    assert start_file.ranks_of(path) == {1: start_file.RankProcess("n1", 0, 7)}
