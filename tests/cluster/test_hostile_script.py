"""Nothing that is written into a job's script is read by a shell or by sbatch: it arrives as typed, or is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.launch.cluster.job_spec import JobSpec
from tunesmith.launch.cluster.sbatch import DRIVER, render
from tunesmith.train.config.config import ClusterConfig
from tunesmith.train.errors import ConfigError

pytestmark = pytest.mark.cluster
CANARY = "canary"
HOSTILE = [
    "plain", "two words", " leading", "trailing ", "tab\there", "new\nline", "carriage\r\nreturn", "\x1b[31mred",
    "'", '"', "''", '""', "'\"'\"'", "\\", "\\\\", "\\n", "ends with \\", "`touch canary`", "$(touch canary)",
    "${IFS}touch${IFS}canary", "$HOME", "$'\\n'", "; touch canary", "& touch canary", "| touch canary",
    "&& touch canary #", "> canary", "< /dev/null", "\n#SBATCH --wrap='touch canary'\n", "#SBATCH --comment=x",
    "EOF\ntouch canary\nEOF", "*", "?", "~", "{a,b}", "[a-z]", "!!", "%j", "%%", "-", "--", "--help", "=", "a=b",
    "é ü 漢字", "🙂", "\u202eright to left", "\x7f", "x" * 4000, "$(printf canary > canary)", "'; touch canary; '",
    "\n", "\t", "a\\\nb", "\udce9 not UTF-8",
]  # fmt: skip


@pytest.fixture(scope="module")
def argv_of(slurm, tmp_path_factory):
    """argv_of(scripts) runs them all in one job and returns the arguments that the command of each got."""
    home = tmp_path_factory.mktemp("argv")
    (home / "tunesmith_argv.py").write_text(
        "import json, os, sys\nprint(json.dumps(sys.argv[1:]), file=open(os.environ['ARGV_FILE'], 'a'))\n"
    )

    def call(scripts: list[str]) -> list[list[str]]:
        number = len(list(home.glob("job-*.sh")))
        path, found = home / f"job-{number}.sh", home / f"argv-{number}"
        bodies = [script.partition("set -euo pipefail\n")[2].replace(DRIVER, "tunesmith_argv") for script in scripts]
        commands = [f"({body.rstrip()}\n)" for body in bodies]  # each replaces its shell, as the script's does
        text = "\n".join(["#!/bin/bash", *commands, ""])
        path.write_bytes(text.encode(errors="surrogateescape"))
        env = {"ARGV_FILE": str(found), "PYTHONPATH": str(home)}
        job_id = slurm.run("sbatch", "--parsable", f"--output={home}/%j.log", str(path), env=env, cwd=home)
        slurm.wait_for(job_id, "COMPLETED", timeout=90)
        assert not (home / CANARY).exists()
        return [json.loads(line) for line in found.read_text().splitlines()]

    call.home = home
    return call


def spec_of(**values) -> JobSpec:
    return JobSpec(**({"run_dir": Path("/tmp/run"), "overrides": []} | values))


def test_every_hostile_override_arrives_as_it_was_typed(argv_of):
    spec = spec_of(overrides=[f"data.train={text}" for text in HOSTILE] + HOSTILE)
    script = render(spec, ClusterConfig(), "run")
    (found,) = argv_of([script])
    assert JobSpec.parse(found) == spec
    assert found == spec.arguments()
    assert not any(line.startswith("#SBATCH") for line in script.partition("set -euo")[2].splitlines())


FREE = {
    "container": lambda text: spec_of(container=text),
    "container_python": lambda text: spec_of(container="image", container_python=text),
    "container_mounts": lambda text: spec_of(container_mounts=(text,)),
    "config_dir": lambda text: spec_of(config_dir=Path("/tmp") / text),
}


@pytest.mark.parametrize("field", FREE)
def test_every_hostile_text_of_a_field_arrives(argv_of, field):
    specs = [FREE[field](text) for text in HOSTILE]
    found = argv_of([render(spec, ClusterConfig(), "run") for spec in specs])
    assert [JobSpec.parse(arguments) for arguments in found] == specs


@pytest.mark.parametrize("field", ["name", "run_dir"])
def test_a_hostile_name_or_folder_arrives_or_is_refused(slurm, argv_of, field):
    refused = 0
    for number, text in enumerate(HOSTILE):
        spec = spec_of(run_dir=argv_of.home / text) if field == "run_dir" else spec_of()
        try:
            script = render(spec, ClusterConfig(), text if field == "name" else "run")
        except ConfigError:
            refused += 1
            continue
        path = argv_of.home / f"name-{number}.sh"
        path.write_bytes(script.replace("exec ", ": ").encode(errors="surrogateescape"))
        if field == "run_dir":
            (spec.run_dir / "job").mkdir(parents=True, exist_ok=True)
        done = slurm.call("sbatch", "--parsable", "--hold", str(path), cwd=argv_of.home)
        assert done.returncode == 0, (text, done.stderr)
        said = slurm.run("scontrol", "show", "job", done.stdout.strip())
        slurm.run("scancel", done.stdout.strip())
        if field == "name":
            assert f"JobName={text}" in said
        assert not (argv_of.home / CANARY).exists()
    assert 10 < refused < len(HOSTILE) - 20


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "constraint", "reservation", "time", "memory", "cpu_bind"]
)
def test_a_hostile_word_for_slurm_is_refused_before_anything_is_written(key):
    for text in HOSTILE:
        if text == "plain" or (key == "constraint" and text in ("[a-z]",)):
            continue
        with pytest.raises(ConfigError, match=f"cluster.{key}"):
            ClusterConfig(**{key: text})


@pytest.mark.parametrize("key", ["modules", "sbatch", "exclude", "env"])
def test_a_hostile_item_of_a_list_is_refused(key):
    for text in HOSTILE:
        if text in {"modules": ("plain", "a=b"), "sbatch": ("--help",), "env": ("plain", "a=b")}.get(key, ("plain",)):
            continue  # as harmless as it looks
        with pytest.raises(ConfigError, match=f"cluster.{key}"):
            ClusterConfig(**{key: [text]})


def test_each_script_is_quoted_for_bash(tmp_path):
    """shellcheck finds nothing, and bash itself gives back every text."""
    cluster = ClusterConfig(modules=["cuda/12.8"], env=["A=$(touch canary)", "B=it's"])
    script = render(spec_of(overrides=HOSTILE, container="an image"), cluster, "my run")
    done = subprocess.run(
        ["shellcheck", "--severity=style", "-"], input=script.encode(errors="surrogateescape"), capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")
    prints = f"import json, sys; json.dump(sys.argv[1:], open({str(tmp_path / 'argv')!r}, 'w'))"
    (tmp_path / "show.py").write_text(prints)
    text = script.replace("-P -m tunesmith.launch.cluster.job", str(tmp_path / "show.py"))
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("module load")]
    (tmp_path / "script.sh").write_bytes("".join(lines).encode(errors="surrogateescape"))
    subprocess.run(["bash", str(tmp_path / "script.sh")], cwd=tmp_path, check=True, timeout=60)
    assert json.loads((tmp_path / "argv").read_text())[-len(HOSTILE) :] == HOSTILE
    assert not (tmp_path / CANARY).exists()
    assert sys.executable in script
