"""Whatever a person gets wrong: one clear message, an exit code, and nothing half-made left behind.

The command lines run as processes of their own, through the script's main(), forked from one that has imported torch
(commands.py): the exit code, stderr and files are what a user gets, at a tenth of the price of starting each anew.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from train_ranks import start_ranks
from zygote import Zygote

from tunesmith.train.paths import CONF_DIR

TINY = CONF_DIR / "model/tiny"
GOOD = '{"prompt": "How do I log in?", "completion": "With your e-mail."}\n'
Run = Callable[..., dict[str, Any]]
SMALL = ("+exp=debug", "data.validation=[]", "evaluate.every_steps=null", "batch.sequence_length=128")


@dataclass
class Case:
    """Overrides, and words of the three lines. {root} is the folder of this session's inputs."""

    overrides: tuple[str, ...]
    problem: str
    place: str = ""
    remedy: str = ""
    data: str | bytes = GOOD
    options: list[str] = field(default_factory=list)


def message(role: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]}) + "\n"


MODEL = "model=hub"
CASES = {
    "a file that is not there": Case(
        ("data.train={root}/nope.jsonl",),
        "there is no file or folder {root}/nope.jsonl",
        "{root}/nope.jsonl",
        "start at",
    ),
    "a validation file that is not there": Case(("data.validation={root}/nope.jsonl",), "{root}/nope.jsonl"),
    "an empty file": Case((), "{data} has no rows.", "{data}", "one JSON object a line", data=""),
    "blank lines": Case((), "{data} has no rows.", "{data}", data="\n \n"),
    "invalid JSON at line 3": Case(
        (), "{data}:3: not JSON", remedy="one JSON object a line", data=GOOD * 2 + '{"prompt": \n'
    ),
    "NUL bytes": Case((), "{data}:2: NUL bytes", remedy="UTF-8", data=GOOD + "\0\n"),
    "not UTF-8": Case((), "{data}:2: not UTF-8 at byte 1", remedy="UTF-8", data=GOOD.encode() + b"\xff\xfe\n"),
    "a row nested too deep": Case(
        (),
        "{data}:1: tools: nested more than 64 levels deep",
        remedy="flatten",
        data='{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        + f'"tools": [{{"x": {"[" * 300}{"]" * 300}}}]}}\n',
    ),
    "a row nested too deep for JSON": Case((), "{data}:2: not JSON", data=GOOD + "[" * 5000),
    "a config.json nested too deep": Case((MODEL, "model.name_or_path={root}/deep_config"), "deep_config"),
    "a list of weights nested too deep": Case(
        (MODEL, "model.name_or_path={root}/deep_index"), "index.json can't be read"
    ),
    "an override nested too deep": Case((f"engine.deepspeed.x={'[' * 300}",), "is nested more than 32 deep"),
    "a field of the wrong type": Case(
        (),
        "{data}:2: completion: must be a string, not 3",
        remedy="one string",
        data=GOOD + '{"prompt":"a","completion":3}\n',
    ),
    "an unknown field": Case((), "{data}:1: promt", remedy="rename it", data='{"promt": "a", "completion": "b"}\n'),
    "an unknown role": Case(
        (), "{data}:1: messages[1].role: unknown role 'bot'", remedy="one of system", data=message("bot")
    ),
    "no assistant turn": Case(
        (), "{data}:1: messages: no assistant message", remedy="add the answer", data=message("user")
    ),
    "a conversation of which nothing is learned": Case(
        (),
        "{data}:2: messages: every assistant message has weight 0",
        remedy="above 0",
        data=message("assistant") + message("assistant").replace('"b"', '"b", "weight": 0'),
    ),
    "a line of 50 MB": Case(
        (), "{data}:2: the line has more than 32 MiB", remedy="one JSON object a line", data=GOOD + "a" * 50_000_000
    ),
    "a record longer than the context": Case(
        ("data.truncate=error",),
        "{data}:2: ",
        "batch.sequence_length (command line: batch.sequence_length=128)",
        "data.truncate=drop or left_of_prompt",
        data=GOOD + json.dumps({"prompt": "word " * 300, "completion": "b"}) + "\n",
    ),
    "a split that leaves nothing": Case(
        ("data.validation_fraction=0.5",), "of 1 records leaves", "data.validation_fraction"
    ),
    "a chat template that is not there": Case(
        ("data.chat_template={root}/no.jinja",),
        "neither auto, raw nor a file",
        "data.chat_template (command line",
        ".jinja",
    ),
    "a model folder that is not there": Case(
        (MODEL, "model.name_or_path={root}/no_model"),
        "there is no such folder",
        "model.name_or_path (command line",
        "folder",
    ),
    "an empty model folder": Case(
        (MODEL, "model.name_or_path={root}/empty_model"), "Unrecognized model", "model.name_or_path", "a config.json"
    ),
    "a model folder without a tokenizer": Case(
        (MODEL, "model.name_or_path={root}/no_tokenizer"),
        "the folder holds none",
        "model.name_or_path",
        "tokenizer.json",
    ),
    "a model folder without weights": Case(
        (MODEL, "model.name_or_path={root}/no_weights"),
        "no file named model.safetensors",
        "model.name_or_path",
        "weights",
    ),
    "a model folder without weights, ZeRO 3": Case(
        (MODEL, "model.name_or_path={root}/no_weights", "engine=zero3"),
        "lacks weights in safetensors",
        "model.name_or_path",
    ),
    "damaged weights": Case(
        (MODEL, "model.name_or_path={root}/damaged"), "no model can be loaded", "model.name_or_path", "safetensors"
    ),
    "damaged weights, ZeRO 3": Case(
        (MODEL, "model.name_or_path={root}/damaged", "engine=zero3"),
        "model.safetensors can't be read",
        "damaged",
        "anew",
    ),
    "weights that are a pickle": Case(
        (MODEL, "model.name_or_path={root}/pickled"), "no model can be loaded", "model.name_or_path", "safetensors"
    ),
    "a damaged model config": Case(
        (MODEL, "model.name_or_path={root}/bad_config"), "not a valid JSON file", "model.name_or_path"
    ),
    "an unknown architecture": Case((MODEL, "model.name_or_path={root}/unknown"), "nonsense", "model.name_or_path"),
    "a model that wants to run its own code": Case(
        (MODEL, "model.name_or_path={root}/coded"),
        "brings its own code",
        "model.name_or_path",
        "trust_remote_code=true",
    ),
    "a tokenizer that wants to run its own code": Case(
        (MODEL, "model.name_or_path={root}/coded_tokenizer"), "brings its own code", "", "model.trust_remote_code=true"
    ),
    "a kernel that is not installed": Case(
        ("model.attention=flash_attention_2",),
        "needs a library that is not there",
        "model.attention",
        "model.attention=auto",
    ),
    "an unknown key": Case(
        ("optimizer.lr=1",),
        "'optimizer.lr'. Did you mean optimizer.learning_rate?",
        "command line: optimizer.lr=1",
        "docs",
    ),
    "a raw key that contradicts ours": Case(
        ("engine.deepspeed.zero_optimization.stage=3",),
        "contradicts engine.stage",
        "(command line: engine.deepspeed.zero_optimization.stage=3)",
        "set engine.stage",
    ),
    "a raw key that DeepSpeed refuses": Case(
        ("engine.deepspeed.zero_optimization.foo=3",),
        "DeepSpeed refuses foo",
        "engine.deepspeed.zero_optimization.foo (command line",
        "drop it",
    ),
    "a raw section that DeepSpeed would pass over": Case(
        ("engine.deepspeed.zero_optimisation.stage=3",),
        "Did you mean zero_optimization?",
        "engine.deepspeed",
        "write engine",
    ),
    "a micro batch that does not divide": Case(
        ("batch.micro_batch_size=3",),
        "global_batch_size=4 does not divide into forwards of 3 sequences (micro_batch_size=3 x world_size=1).",
        "batch.global_batch_size (conf/exp/debug.yaml:",
        "to 3 or 6",
    ),
    "a GPU where there is none": Case(
        ("cluster.device=cuda",),
        "no GPU is visible",
        "cluster.device (command line: cluster.device=cuda)",
        "cluster.device=cpu",
    ),
    "an output folder below /proc": Case(
        ("output_dir=/proc/x/y",),
        "the run folder cannot be made in /proc",
        "output_dir (command line",
        "another output_dir",
    ),
    "an output folder below a file": Case(("output_dir={root}/a_file/x",), "{root}/a_file is a file.", "output_dir"),
    "an output folder that is a file": Case(("output_dir={root}/a_file",), "{root}/a_file is a file.", "output_dir"),
    "an output folder that holds something else": Case(
        ("output_dir={root}/other",), "{root}/other is not empty and holds no run.", "output_dir", "another output_dir"
    ),
    "an output folder with too long a name": Case(
        (f"output_dir={{root}}/{'x' * 300}",), "File name too long", "output_dir"
    ),
    "an output folder that holds a run": Case(
        ("output_dir={root}/run", "resume=never"), "{root}/run already holds a run.", "output_dir", "resume.source=auto"
    ),
    "a cache folder that is a file": Case(
        ("data.cache_dir={root}/a_file",),
        "can't be written to {root}/a_file",
        "data.cache_dir",
        "that you may write to",
    ),
    "no such checkpoint": Case(
        ("resume.source={root}/nope",), "there is no checkpoint.", "{root}/nope", "a run folder"
    ),
    "a folder to resume from, as an option": Case(
        ("resume={root}/run",),
        "resume has no option '{root}/run': it is auto or never.",
        "command line",
        "write resume.source={root}/run",
    ),
    "a checkpoint of another adapter": Case(
        ("resume.source={root}/run", "adapter=lora"),
        "adapter.kind: was none, is lora",
        "{root}/run/checkpoints/step-000001",
        "resume=never",
    ),
    "a checkpoint of other data": Case(
        ("resume.source={root}/run",),
        "data: the content of data.train was ",
        "{root}/run",
        "resume.allow=[data]",
        data=GOOD * 2,
    ),
    "a checkpoint that was cut short": Case(
        ("resume.source={root}/cut",), "state.json has 1 bytes instead of", "{root}/cut", "another checkpoint"
    ),
    "a name that is not compared": Case(
        ("resume.allow=[sed]",), "resume.allow names 'sed', which is not compared. Did you mean seed?", "resume.allow"
    ),
    "a sequence beyond the model's positions": Case(
        ("batch.sequence_length=4096",),
        "sequence_length=4096 is beyond the 1024 positions",
        "batch.sequence_length",
        "1024",
    ),
    "more layers than the model has": Case(
        ("adapter=last_layers", "adapter.num_layers=99"),
        "the model has 3 blocks",
        "adapter.num_layers (command",
        "3 or less",
    ),
    "a target module that is not there": Case(
        ("adapter=lora", "adapter.target_modules=[nope_proj]"),
        "no module nope_proj for LoRA",
        "adapter.target_modules (command",
        "all-linear",
    ),
    "one target module of two that is not there": Case(
        ("adapter=lora", "adapter.target_modules=[q_proj,nope]"),
        "no module nope for LoRA",
        "adapter.target_modules",
        "q_proj",
    ),
    "a sweep": Case((), "a sweep cannot run inside the ranks", "--multirun", "launch/sweep.py", options=["-m"]),
    "a config folder that is not there": Case(
        (),
        "there is no folder {root}/no_conf",
        "--config-dir",
        "your yaml files",
        options=["--config-dir", "{root}/no_conf"],
    ),
    "a config folder that is not named": Case(
        (), "--config-dir needs a value.", "command line", options=["--config-dir"]
    ),
}


def copy_of_tiny(folder: Path, **changes: dict[str, Any]) -> Path:
    """The model that ships, with some keys of its JSON files changed."""
    shutil.copytree(TINY, folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def plant_code(folder: Path, canary: Path) -> None:
    (folder / "planted.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")


def make_inputs(root: Path) -> None:
    (root / "a_file").write_text("")
    (root / "other").mkdir()
    (root / "other/notes.txt").write_text("mine")
    (root / "empty_model").mkdir()
    copy_of_tiny(root / "no_weights")
    for file in copy_of_tiny(root / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    (copy_of_tiny(root / "damaged") / "model.safetensors").write_bytes(b"not safetensors")
    (copy_of_tiny(root / "bad_config") / "config.json").write_text("{")
    (copy_of_tiny(root / "deep_config") / "config.json").write_text('{"a":' * 5000)
    (copy_of_tiny(root / "deep_index") / "model.safetensors.index.json").write_text('{"a":' * 5000)
    copy_of_tiny(root / "unknown", config={"model_type": "nonsense", "architectures": ["Nonsense"]})
    auto = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    plant_code(copy_of_tiny(root / "coded", config={"model_type": "planted", "auto_map": auto}), root / "CANARY")
    tokenizer = {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": ["planted.Model", "planted.Model"]}}
    plant_code(copy_of_tiny(root / "coded_tokenizer", tokenizer_config=tokenizer), root / "CANARY")
    payload = f"cbuiltins\nexec\n(S\"open({str(root / 'CANARY')!r},'w')\"\ntR.".encode()
    (copy_of_tiny(root / "pickled") / "pytorch_model.bin").write_bytes(payload)


@pytest.fixture(scope="module")
def run(command: Run) -> Run:
    """run(root, *arguments) runs launch/train.py in the folder root."""
    return partial(command, "train")


def of_one_step(root: Path) -> list[str]:
    """The overrides of the run that the root holds, but for its folder."""
    data = [f"data.train={root}/good.jsonl", f"data.cache_dir={root.parent}/cache"]
    return [*SMALL, *data, "schedule.max_steps=1", "evaluate.generate=false"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """The inputs, with a finished run of one step among them, and a copy of its checkpoint that was cut short."""
    folder = tmp_path_factory.mktemp("bad_input") / "root"
    folder.mkdir()
    make_inputs(folder)
    (folder / "good.jsonl").write_text(GOOD)
    finished = run(folder, *of_one_step(folder), f"output_dir={folder}/run")
    assert finished["code"] == 0, finished["stderr"]
    shutil.copytree(folder / "run/checkpoints/step-000001", folder / "cut")
    (folder / "cut/state.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def answers(root: Path, run: Run) -> dict[str, dict[str, Any]]:
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        data = root.parent / f"data-{number}.jsonl"
        data.write_bytes(case.data if isinstance(case.data, bytes) else case.data.encode())
        given = [text.replace("{root}", str(root)) for text in (*case.overrides, *case.options)]
        defaults = [f"data.train={data}", f"output_dir={root}/out-{number}", f"data.cache_dir={root.parent}/cache"]
        names = {text.split("=")[0] for text in given}
        rest = [text for text in defaults if text.split("=")[0] not in names]
        found[name] = run(root, *SMALL, *rest, *given)
    return found


@pytest.mark.row(21)
@pytest.mark.parametrize("name", CASES)
def test_it_ends_with_one_clear_message_and_leaves_nothing(name: str, root: Path, answers: dict[str, Any]) -> None:
    case, answer = CASES[name], answers[name]
    data = str(root.parent / f"data-{list(CASES).index(name)}.jsonl")
    problem, place, remedy = (
        text.replace("{root}", str(root)).replace("{data}", data) for text in (case.problem, case.place, case.remedy)
    )
    assert answer["code"] == 2, answer
    assert "Traceback" not in answer["stderr"] + answer["stdout"]
    lines = answer["stderr"].splitlines()
    assert 1 <= len(lines) <= 3, lines
    assert lines[0].startswith(("ConfigError: ", "DataError: ", "ModelError: ", "TrainingError: "))
    assert problem in lines[0]
    at = [line.removeprefix("  at: ") for line in lines if line.startswith("  at: ")]
    do = [line.removeprefix("  do: ") for line in lines if line.startswith("  do: ")]
    assert place in " ".join(at)
    assert len(do) == 1, "there is a remedy"
    assert remedy in do[0]
    assert answer["left"] == [], "something was left behind"


def test_what_can_be_seen_without_the_weights_is_said_before_they_are_loaded(answers: dict[str, Any]) -> None:
    seen_late = ("weights", "kernel", "refuses", "more layers", "target module")
    late = {name for name, answer in answers.items() if "loading" in answer["stdout"]}
    assert {name for name in late if not any(words in name for words in seen_late)} == set()
    assert "a checkpoint of another adapter" not in late


def test_no_code_of_a_model_folder_has_run(root: Path, answers: dict[str, Any]) -> None:
    assert answers["a model that wants to run its own code"]["code"] == 2
    assert not (root / "CANARY").exists()


def test_the_cache_holds_whole_folders_only(root: Path, answers: dict[str, Any]) -> None:
    assert not [path for path in (root.parent / "cache").iterdir() if path.suffix == ".tmp"]


def test_a_checkpoint_of_another_run_is_refused_once_for_all_ranks(root: Path, zygote: Zygote) -> None:
    drifted = ("seed=1", f"output_dir={root}/two_ranks", f"resume.source={root}/run")
    done = start_ranks(zygote, [*of_one_step(root), *drifted], cwd=root).wait()
    assert 0 not in done.codes.values()
    assert done.said.count("the checkpoint is of another run. seed: was 0, is 1.") == 1
    assert not (root / "two_ranks").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_before_anything_is_trained(small_disk: Path, tmp_path: Path, run: Run) -> None:
    cache = f"data.cache_dir={tmp_path}/cache"
    no_room = run(tmp_path, "+exp=debug", f"output_dir={small_disk}/run", cache)
    full_cache = run(tmp_path, "+exp=debug", f"output_dir={tmp_path}/run", f"data.cache_dir={small_disk}/cache")
    assert no_room["code"] == full_cache["code"] == 2
    needs, at, do = no_room["stderr"].splitlines()
    assert "the run needs about 0.25 GiB of disk" in needs
    assert "output_dir" in at
    assert "free space" in do
    what_line, at, do = full_cache["stderr"].splitlines()
    assert "the prepared data can't be written" in what_line
    assert "No space left on device" in what_line
    assert "data.cache_dir" in at
    assert "space" in do
    assert not (tmp_path / "run").exists()
    assert not list(small_disk.glob("run*"))
    assert not [path for path in small_disk.rglob("*") if path.name.endswith(".tmp")]
