"""The script of a job: what SLURM is asked for, and that bash gives back every argument as it was typed."""

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tunesmith.launch.cluster import steps
from tunesmith.launch.cluster.job_spec import JobSpec
from tunesmith.launch.cluster.sbatch import DRIVER, quoted, render
from tunesmith.train.config.config import ClusterConfig, ClusterKind
from tunesmith.train.errors import ConfigError

HOSTILE = ["two words", "it's", '"', "$(touch canary)", "`id`", "new\nline", "a\r\nb", "\\", "--", "-", "", "é", "$'x'"]
ODD_FOLDER = """l'été (1)/a=b,c [2] {3} $HOME ~x "q" 100% #;&|"""
WHOLE = JobSpec(
    run_dir=Path("/runs/a b"),
    overrides=["+exp=debug", *HOSTILE],
    config_dir=Path("/my conf"),
    nodes=2,
    ranks_per_node=8,
    gpus_per_node=8,
    cpus_per_task=12,
    cpu_bind="sockets",
    exclude=("n1", "gpu[3-4]"),
    preflight=False,
    max_restarts=5,
    no_progress=1,
    container="an image.sif",
    container_runtime="enroot",
    container_mounts=("/data", "/a:/b"),
    container_python="/opt/py thon",
)


@pytest.mark.parametrize("spec", [WHOLE, JobSpec(run_dir=Path("/r"), overrides=[])])
def test_a_spec_survives_its_arguments(spec):
    assert JobSpec.parse(spec.arguments()) == spec


@pytest.mark.parametrize("arguments", [["--run-dir=/r"], ["--nodes", "2", "--"], ["--nodez=2", "--"], ["x", "--"]])
def test_arguments_of_nobody_are_refused(arguments):
    with pytest.raises(ConfigError, match=r"launch/slurm\.py"):
        JobSpec.parse(arguments)


def test_the_directives_say_what_the_config_says():
    cluster = ClusterConfig(
        kind=ClusterKind.slurm, partition="gpu,big", account="me", qos="high", constraint="h100&ib", time="1-00:00:00",
        memory="0", reservation="r", sbatch=["--switches=1"], signal_seconds=120,
    )  # fmt: skip
    lines = render(WHOLE, cluster, "my run").splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert asked == {
        '--job-name="my run"', '--output="/runs/a b/job/job-%j.log"', f"--chdir={Path.cwd()}", "--nodes=2",
        "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=0", "--time=1-00:00:00",
        "--partition=gpu,big", "--account=me", "--qos=high", "--constraint=h100&ib", "--reservation=r",
        "--exclude=n1,gpu[3-4]", "--signal=USR1@120", "--open-mode=append", "--requeue", "--switches=1",
    }  # fmt: skip


def test_bash_gives_back_every_argument(tmp_path):
    script = render(WHOLE, ClusterConfig(env=["A=$(touch canary) it's"]), "run")
    show = tmp_path / "show.py"
    show.write_text(
        f"import json, os, sys; json.dump([sys.argv[1:], os.environ['A']], open({str(tmp_path / 'found')!r}, 'w'))"
    )
    (tmp_path / "script.sh").write_text(script.replace(f"-P -m {DRIVER}", str(show)))
    subprocess.run(["bash", str(tmp_path / "script.sh")], cwd=tmp_path, check=True, timeout=60)
    assert json.loads((tmp_path / "found").read_text()) == [WHOLE.arguments(), "$(touch canary) it's"]
    assert not (tmp_path / "canary").exists()


def test_a_secret_of_the_config_stands_in_no_script():
    script = render(WHOLE, ClusterConfig(env=["WANDB_API_KEY=0123456789", "SHOWN=yes"]), "run")
    assert "0123456789" not in script
    assert "export SHOWN=yes" in script


@pytest.mark.parametrize("text", ["", "a", "a\x00b", "\x1f\x7f", "'\n'", "\\\n", "\x01" + "1"])
def test_control_characters_are_written_as_escapes(text):
    word = quoted(text)
    assert "\n" not in word
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, timeout=30, check=True)
    assert done.stdout.decode() == text.split("\x00")[0]  # no argument of a program holds a NUL


@pytest.mark.parametrize(("name", "key"), [("a\\b", "at: name"), ("a\nb", "at: name"), (900 * "é" + "é", "at: name")])
def test_what_no_directive_can_hold_is_refused(name, key):
    with pytest.raises(ConfigError, match="cannot be written in a script of sbatch") as caught:
        render(WHOLE, ClusterConfig(), name)
    assert key in str(caught.value)


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is what reads directives")
def test_sbatch_reads_a_folder_as_it_is_called(tmp_path):
    folder = tmp_path / ODD_FOLDER
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        script = render(JobSpec(run_dir=folder, overrides=[]), ClusterConfig(), 'l\'été "1"')
    (tmp_path / "script.sh").write_text(script)
    conf = "ClusterName=x\nSlurmctldHost=localhost\nNodeName=localhost\nPartitionName=p Nodes=ALL\nAuthType=auth/none\n"
    (tmp_path / "slurm.conf").write_text(f"{conf}MessageTimeout=1\nSlurmctldPort=1\n")
    env = {"SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": os.environ["PATH"]}
    sbatch = ["sbatch", "-vv", "--test-only", str(tmp_path / "script.sh")]
    asked = subprocess.Popen(sbatch, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows = {}
    for line in asked.stdout:  # it says what it has read, and then asks a controller that is not there
        name, _, value = line.removeprefix("sbatch: ").partition(":")
        rows[name.strip()] = value.strip()
        if "output" in rows:
            break
    asked.kill()
    asked.communicate()
    assert rows["chdir"] == str(folder)
    assert rows["output"] == f"{folder}/job/job-".replace("%", "%%") + "%j.log"
    assert rows["job-name"] == 'l\'été "1"'


def test_each_rank_is_a_task_of_its_own_with_its_own_log():
    command = steps.training(JobSpec(run_dir=Path("/r 100%"), overrides=[], nodes=2, ranks_per_node=4), 3, ["a=b c"])
    assert command[0] == "srun"
    assert {"--kill-on-bad-exit=1", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"} <= set(command)
    assert "--output=/r 100%%/job/logs/3/rank-%5t.log" in command
    assert command[-2:] == ["a=b c", "output_dir='/r 100%'"]


def test_a_container_gets_the_code_the_run_and_the_mounts():
    enroot = steps.training(WHOLE, 0, [])
    assert "--container-image=an image.sif" in enroot
    assert enroot[enroot.index("--container-image=an image.sif") + 2] == "/opt/py thon"
    apptainer = steps.in_container(
        JobSpec(run_dir=Path("/r"), overrides=[], container="i.sif", gpus_per_node=1, container_mounts=("/d",)),
        ["python"],
    )
    code = str(Path(__file__).resolve().parents[3])
    binds = ["--bind", f"{code}:{code}", "--bind", "/r:/r", "--bind", "/d"]
    assert apptainer == ["apptainer", "exec", "--nv", *binds, "i.sif", "python"]
