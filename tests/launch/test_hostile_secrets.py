"""Eight secrets are put wherever people keep them; then every byte that a run has left is searched for them.

One training ends well, one breaks with a traceback that quotes them (both log to W&B offline), and command lines that
cannot be run quote them too.
"""

import base64
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from zygote import Zygote

Ran = Callable[..., tuple[subprocess.CompletedProcess[str], Path]]
SECRETS = {
    "HF_TOKEN": "hf_Kanarie0" + "aQ7" * 9,
    "WANDB_API_KEY": "5e1f" * 10,
    "OPENAI_API_KEY": "Kanarie2-mE9xT4uW",
    "AWS_SECRET_ACCESS_KEY": "Kanarie3/pR0+sT1uV",
    "override": "Kanarie4-bN8cM7zX",
    "yaml": "Kanarie5-lK6jH5gF",
    "userinfo": "Kanarie6-dS4aP3oI",
    "netrc": "Kanarie7-uY2tR1eW",
}
IN_ENVIRONMENT = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
QUOTING_NAMES = (  # what a person may do, with the secrets that the environment holds
    "name=bot-${oc.env:HF_TOKEN}",
    "track.project=${oc.env:OPENAI_API_KEY}-${oc.env:AWS_SECRET_ACCESS_KEY}",
)
TRAIN = """
import sys
from tunesmith.launch.arguments import main
from tunesmith.launch.train import train

def run(arguments):
    sys.argv = ["train.py", *arguments]
    main(train)
"""
# The training fails in its second step, with an error that quotes every secret it can know.
FAILING = """
import os, sys
from tunesmith.launch.arguments import main
from tunesmith.launch.train import train
import tunesmith.train.run.run

def run(arguments):
    sys.argv = ["train.py", *arguments]
    prepare = tunesmith.train.run.run.prepare
    tunesmith.train.run.run.prepare = lambda *given, **options: with_a_broken_step(prepare, *given, **options)
    main(lambda arguments: train(arguments[:-1]))

def with_a_broken_step(prepare, *arguments, **options):
    import tunesmith.train.run.loop as loop
    step = loop.optimizer_step
    steps = []

    def broken(*arguments, **options):
        steps.append(None)
        if len(steps) == 2:
            quoted = [os.environ[name] for name in sys.argv.pop().split(",")]
            raise RuntimeError(f"cannot reach https://me:{secret()}@host with {quoted} and password={secret()}")
        return step(*arguments, **options)

    loop.optimizer_step = broken
    return prepare(*arguments, **options)

def secret():
    return next(text for text in sys.argv if "password" in text).rsplit("=", 1)[1].strip("'")
"""


def variants(secret: str) -> set[bytes]:
    """The bytes a secret may stand in: as it is, quoted for a URL, in base64 at any of the three offsets."""
    raw = secret.encode()
    encoded = {base64.b64encode(b"x" * offset + raw)[4 if offset else 0 : -4] for offset in range(3)}
    return {raw, quote(secret, safe="").encode()} | {text for text in encoded if len(text) > 12}


def found_in(folder: Path, *texts: str) -> dict[str, list[str]]:
    """Secret -> the places that hold it, among the texts and all files below the folder."""
    places = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places |= {f"text {number}": text.encode() for number, text in enumerate(texts)}
    return {
        name: where
        for name, secret in SECRETS.items()
        if (where := [place for place, held in places.items() if any(v in held for v in variants(secret))])
    }


@pytest.fixture(scope="module")
def ran(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """ran("name", code, *arguments) calls run(arguments) of a program with the secrets around it.

    All it can write to lies in one folder.
    """
    own = tmp_path_factory.mktemp("own")  # what the person has: their files may hold secrets
    (own / "exp").mkdir()
    (own / "exp/mine.yaml").write_text(
        f"# @package _global_\ntrack:\n  tags: ['password={SECRETS['yaml']}', 'https://me:{SECRETS['userinfo']}@host/x']\n"
    )
    (own / "rows.jsonl").write_text('{"prompt": "How do I log in?", "completion": "With your e-mail."}\n')
    home = own / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRETS['netrc']}\n")
    (home / ".netrc").chmod(0o600)

    def run(name: str, program: str, *more: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        folder = tmp_path_factory.mktemp(name)
        dropped = ("WANDB_", "SLURM_", "RANK", "TUNESMITH")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        ours = {"HOME": home, "XDG_CACHE_HOME": folder / "cache", "TMPDIR": folder, "HF_HUB_OFFLINE": 1}
        ours |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": folder / "extensions"}
        environment = kept | {key: str(value) for key, value in ours.items()}
        environment |= {key: SECRETS[key] for key in IN_ENVIRONMENT}
        script = own / "script.py"
        script.write_text(program)
        arguments = [f"--config-dir={own}", "+exp=[debug,mine]", f"data.train={own}/rows.jsonl", "data.validation=[]"]
        arguments += ["evaluate.generate=false", "evaluate.every_steps=null", "batch.sequence_length=128"]
        arguments += [f"output_dir={folder}/run", "track=wandb", "track.wandb=offline", "schedule.max_steps=2"]
        arguments += ["checkpoint.every_steps=1", f"track.group='password={SECRETS['override']}'"]
        out, err, arguments = own / f"{name}.out", own / f"{name}.err", [*arguments, *more]
        task = {"cwd": folder, "stdout": out, "stderr": err, "env": environment}
        code = zygote.fork(script, "run", {"arguments": arguments}, **task).wait(200)
        done = subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())
        return done, folder

    return run


@pytest.mark.row(32)
def test_a_run_that_ends_well_leaves_no_secret(ran: Ran) -> None:
    done, folder = ran("finishing", TRAIN, *QUOTING_NAMES)
    assert done.returncode == 0, done.stderr
    assert found_in(folder, done.stdout, done.stderr) == {}, done.stderr
    searched = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".wandb", ".yaml", ".jsonl", ".json", ".html", ".safetensors"} <= searched, "so the search saw a run"
    assert "bot-***" in (folder / "run/config.yaml").read_text()


@pytest.mark.row(32)
def test_a_run_that_breaks_leaves_no_secret(ran: Ran) -> None:
    done, folder = ran("failing", FAILING, *QUOTING_NAMES, ",".join(IN_ENVIRONMENT))
    assert done.returncode not in (0, 2), done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert (
        "RuntimeError: cannot reach https://***@host with ['***', '***', '***', '***'] and password=***" in done.stderr
    )
    assert found_in(folder, done.stdout, done.stderr) == {}, done.stderr
    assert list(folder.rglob("*.wandb"))


@pytest.mark.parametrize(
    "more",
    [
        (f"data.train=https://me:{SECRETS['userinfo']}@host/x.jsonl",),
        ("model=hub", f"model.name_or_path=https://me:{SECRETS['userinfo']}@host/model"),
        ("model=hub", "model.name_or_path=./${oc.env:OPENAI_API_KEY}"),
        ("resume.source=/nowhere/${oc.env:AWS_SECRET_ACCESS_KEY}",),
        ("data.chat_template=${oc.env:HF_TOKEN}.jinja",),
        (f"optimizer.api_key={SECRETS['override']}",),
        (f"optimizer.learning_rate.password={SECRETS['override']}",),
        ("seed=${oc.env:WANDB_API_KEY}",),
        ("engine.deepspeed.zero_optimization.reduce_bucket_size=${oc.env:HF_TOKEN}",),
        (f"engine.deepspeed.vault.password={SECRETS['override']}",),
        (f"engine.deepspeed.vault.at=[https://me:{SECRETS['userinfo']}@host/x]",),
    ],
)
def test_a_mistake_is_told_without_the_secret_in_it(more: tuple[str, ...], tmp_path: Path, command: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    rest = [f"data.train={tmp_path}/rows.jsonl"] if not more[0].startswith("data.train") else []
    overrides = ["+exp=debug", "data.validation=[]", "evaluate.every_steps=null", f"output_dir={tmp_path}/run", *rest]
    overrides.append(f"data.cache_dir={tmp_path}/cache")
    answer = command("train", tmp_path, *overrides, *more, env={key: SECRETS[key] for key in IN_ENVIRONMENT})
    assert answer["code"] == 2, answer
    assert found_in(tmp_path, answer["stdout"], answer["stderr"]) == {}


def test_the_composed_config_is_printed_without_secrets(tmp_path: Path, command: Any) -> None:
    secrets = {key: SECRETS[key] for key in IN_ENVIRONMENT}
    raw = f"engine.deepspeed.vault.password={SECRETS['override']}"
    answer = command("train", tmp_path, "+exp=debug", *QUOTING_NAMES, raw, "--cfg", env=secrets)
    assert answer["code"] == 0, answer
    assert "bot-***" in answer["stdout"]
    assert found_in(tmp_path, answer["stdout"], answer["stderr"]) == {}


def test_the_search_would_find_them(tmp_path: Path) -> None:
    """The control: each secret, in each of its forms, in the middle of a file."""
    for name, secret in SECRETS.items():
        for number, form in enumerate(sorted(variants(secret))):
            (tmp_path / f"{name}-{number}").write_bytes(b"\0before " + form + b" after\0")
    assert {name: len(places) for name, places in found_in(tmp_path).items()} == {
        name: len(variants(secret)) for name, secret in SECRETS.items()
    }
    whole = base64.b64encode(f"user:{SECRETS['netrc']}".encode()).decode()
    assert found_in(tmp_path / "none", f"Authorization: Basic {whole}") == {"netrc": ["text 0"]}
