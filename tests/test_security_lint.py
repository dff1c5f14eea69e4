"""The lint gate: each way to run what is read is planted in a file and found by `make lint`'s own configuration."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.launch.unsafe_code import ROOT, findings, python_files

# What must be found, and by which rule.
PLANTED = {
    "eval": ("print(eval(input()))", "S307"),
    "eval under another name": ("run = eval", "TS002"),
    "eval of builtins": ("import builtins\n\nbuiltins.eval(input())", "S307"),
    "exec": ("exec(input())", "S102"),
    "exec under another name": ("from builtins import exec as run", "TS002"),
    "compile": ("code = compile(input(), 'x', 'exec')", "TS002"),
    "__import__": ("__import__(input())", "TS002"),
    "pickle": ("import pickle", "TID251"),
    "pickle.loads": ("from pickle import loads", "TID251"),
    "_pickle": ("import _pickle", "TID251"),
    "dill": ("import dill", "TID251"),
    "cloudpickle": ("import cloudpickle", "TID251"),
    "joblib": ("from joblib import load", "TID251"),
    "marshal": ("import marshal", "TID251"),
    "shelve": ("import shelve", "TID251"),
    "runpy": ("import runpy", "TID251"),
    "torch.load": ("import torch\n\ntorch.load('x')", "TS001"),
    "torch.load, weights_only=False": ("import torch\n\ntorch.load('x', weights_only=False)", "TS001"),
    "torch.load, weights_only by a variable": (
        "import torch as t\n\nsafe = 1\nt.load('x', weights_only=safe)",
        "TS001",
    ),
    "torch.load by its own name": ("from torch import load as read\n\nread('x')", "TS001"),
    "torch.serialization.load": ("import torch\n\ntorch.serialization.load('x')", "TS001"),
    "torch.hub": ("import torch\n\ntorch.hub.load('a/b', 'c')", "TID251"),
    "torch.package": ("from torch.package import PackageImporter", "TID251"),
    "allow_pickle": ("import numpy as np\n\nnp.load('x', allow_pickle=True)", "TS004"),
    "allow_pickle by a variable": ("import numpy as np\n\nyes = 1\nnp.load('x', allow_pickle=yes)", "TS004"),
    "yaml.load": ("import yaml\n\nyaml.load('x', Loader=yaml.Loader)", "TID251"),
    "yaml.unsafe_load": ("from yaml import unsafe_load", "TID251"),
    "yaml.full_load": ("import yaml\n\nyaml.full_load('x')", "TID251"),
    "shell=True": ("import subprocess\n\nsubprocess.run('ls', shell=True)", "TS005"),
    "shell by a variable": ("import subprocess\n\nyes = 1\nsubprocess.Popen('ls', shell=yes)", "TS005"),
    "os.system": ("import os\n\nos.system('ls')", "TID251"),
    "os.system by its own name": ("from os import system", "TID251"),
    "os.popen": ("import os\n\nos.popen('ls')", "TID251"),
    "subprocess.getoutput": ("import subprocess\n\nsubprocess.getoutput('ls')", "TID251"),
    "all_gather_object": ("import torch.distributed as dist\n\ndist.all_gather_object([], 1)", "TS003"),
    "gather_object": ("from torch import distributed\n\ndistributed.gather_object(1)", "TS003"),
    "broadcast_object_list": ("from torch.distributed import broadcast_object_list", "TS003"),
    "scatter_object_list": ("import torch\n\ntorch.distributed.scatter_object_list([], [])", "TS003"),
    "send_object_list": ("import torch.distributed as d\n\nd.send_object_list([1], 0)", "TS003"),
    "recv_object_list": ("import torch.distributed as d\n\nd.recv_object_list([None], 0)", "TS003"),
    "hydra.utils.instantiate": ("from hydra.utils import instantiate", "TID251"),
    "hydra.utils.call": ("import hydra\n\nhydra.utils.call({})", "TID251"),
    "instantiate under another name": ("import hydra.utils as h\n\nh.instantiate({})", "TS007"),
    "a resolver that may run code": (
        "from omegaconf import OmegaConf\n\nOmegaConf.register_new_resolver('x', print)",
        "TS007",
    ),
    "Jinja without its sandbox": ("import jinja2\n\njinja2.Environment()", "TID251"),
    "trust_remote_code=True": (
        "import transformers\n\ntransformers.AutoModel.from_pretrained('x', trust_remote_code=True)",
        "TS006",
    ),
    "tarfile.extractall": ("import tarfile\n\ntarfile.open('x').extractall()", "S202"),
    "tempfile.mktemp": ("import tempfile\n\ntempfile.mktemp()", "S306"),
    "a mode for everyone": ("import os\n\nos.chmod('x', 0o777)", "S103"),
    "TLS without a check": ("import requests\n\nrequests.get('https://x', verify=False, timeout=1)", "S501"),
    "a rule set aside without a reason": (
        "import subprocess\n\nsubprocess.run('ls', shell=True)  # noqa: S602, TS005",
        "TS008",
    ),
}
CLEAN = """
import re
import subprocess

import numpy as np
import torch
import yaml

torch.load("x", weights_only=True)
np.load("x", allow_pickle=False)
np.load("x", mmap_mode="r")
yaml.safe_load("x")
subprocess.run(["ls"], shell=False, check=True)
re.compile("x")
torch.nn.Linear(1, 1).eval()
"""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The codes that the gate reports for each planted file, and for the clean one."""
    folder = tmp_path_factory.mktemp("planted") / "train"
    folder.mkdir()
    names = {f"planted_{number}": name for number, name in enumerate(PLANTED)} | {"clean": "clean"}
    texts = {name: text for name, (text, _) in PLANTED.items()} | {"clean": CLEAN}
    for stem, name in names.items():
        (folder / f"{stem}.py").write_text(texts[name] + "\n")
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "check", "--no-cache", "--config", ROOT / "pyproject.toml", "--output-format", "json", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    codes: dict[str, set[str]] = {name: set() for name in names.values()}
    for entry in json.loads(done.stdout):
        codes[names[Path(entry["filename"]).stem]].add(entry["code"])
    for file in python_files([str(folder)]):
        codes[names[file.stem]] |= {finding.code for finding in findings(file)}
    return codes


@pytest.mark.parametrize("name", PLANTED)
def test_each_way_to_run_what_is_read_is_found(name: str, reported: dict[str, set[str]]) -> None:
    assert PLANTED[name][1] in reported[name]


def test_code_that_reads_safely_is_left_alone(reported: dict[str, set[str]]) -> None:
    security = {code for code in reported["clean"] if code.startswith(("S", "TS", "TID"))}
    assert security == set()


@pytest.mark.slow  # `make lint` says the same
def test_the_tree_is_clean() -> None:
    files = python_files([])
    assert {ROOT / "train/run/run.py", ROOT / "launch/train.py", ROOT / "tests/conftest.py"} <= set(files)
    assert [str(finding) for file in files for finding in findings(file)] == []


def test_an_exception_is_one_line_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("f(shell=True)  # noqa: TS005 - the name of a switch, no process\ng(shell=True)\n")
    assert [(finding.line, finding.code) for finding in findings(file)] == [(2, "TS005")]


def test_make_lint_calls_it_and_a_finding_fails_it(tmp_path: Path) -> None:
    asked = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "tunesmith.launch.unsafe_code" in asked.stdout
    (tmp_path / "x.py").write_text("eval('1')\n")
    command = [sys.executable, "-m", "tunesmith.launch.unsafe_code", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{tmp_path}/x.py:1: TS002 it runs a text as code" in done.stderr
    shutil.rmtree(tmp_path)


def test_each_promise_names_a_test_that_is_there() -> None:
    rows = [
        line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ") and "tests/" in line
    ]
    named = [name for row in rows for name in re.findall(r"`(tests/[^`]+)`", row)]
    assert len(named) >= 8
    assert [name for name in named if not list(ROOT.glob(name))] == []


def test_the_floors_of_the_libraries_are_the_ones_that_are_promised() -> None:
    floors = dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text()))
    promised = re.findall(r"^\| ([a-z-]+) \| ([0-9.]+) \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert len(promised) == 6
    assert {name: floors[name] for name, _ in promised} == dict(promised)
