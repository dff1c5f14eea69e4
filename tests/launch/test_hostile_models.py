"""Model folders that want to run code: in training, chat, evaluation and export, none of it runs.

Every payload would leave the same canary. The commands answer yes to any question, as a person in a hurry would.
"""

import contextlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.train.config.compose import compose_config
from tunesmith.train.data.tokenizer import load_tokenizer
from tunesmith.train.errors import ConfigError, ModelError
from tunesmith.train.model.foreign_code import check_adapter, check_kernels
from tunesmith.train.paths import CONF_DIR

TINY = CONF_DIR / "model/tiny"
FLAG = "model.trust_remote_code=true"
ROW = '{"prompt": "How do I log in?", "completion": "With your e-mail."}\n'
SMALL = ("+exp=debug", "data.validation=[]", "evaluate.every_steps=null", "evaluate.generate=false")
ONE_STEP = ("batch.sequence_length=128", "schedule.max_steps=1", "checkpoint.at_end=false")
Command = Callable[..., dict[str, Any]]


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def add_code(folder: Path, canary: Path) -> None:
    text = f"open({str(canary)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    for name in ("planted.py", "modeling_planted.py", "configuration_planted.py", "setup.py", "__init__.py"):
        (folder / name).write_text(text)


def pickle_that_touches(canary: Path) -> bytes:
    """What pickle.dumps makes of an object whose __reduce__ is (os.system, ("touch canary",))."""
    return f"cposix\nsystem\n(Vtouch {canary}\ntR.".encode()


def zip_that_touches(path: Path, canary: Path) -> None:
    """A file of torch.save's own format whose data.pkl is the payload."""
    torch.save({"w": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, pickle_that_touches(canary) if name.endswith("data.pkl") else data)


def coded_config(folder: Path, canary: Path) -> None:
    add_code(folder, canary)
    auto = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    change(folder, "config.json", model_type="planted", auto_map=auto, trust_remote_code=True)  # noqa: TS006 - a JSON file


def coded_config_of_another_repository(folder: Path, canary: Path) -> None:
    add_code(folder, canary)
    auto = {"AutoConfig": f"{folder}--planted.Config", "AutoModelForCausalLM": f"{folder}--planted.Model"}
    change(folder, "config.json", model_type="planted", auto_map=auto, trust_remote_code="yes")


def coded_tokenizer(folder: Path, canary: Path) -> None:
    add_code(folder, canary)
    auto = {"AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"]}
    change(folder, "tokenizer_config.json", tokenizer_class="Planted", auto_map=auto, trust_remote_code=True)  # noqa: TS006 - a JSON file


def pickled_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "pytorch_model.bin").write_bytes(pickle_that_touches(canary))


def zipped_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    zip_that_touches(folder / "pytorch_model.bin", canary)


def indexed_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "part.bin").write_bytes(pickle_that_touches(canary))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "part.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def kernel(folder: Path, canary: Path) -> None:
    change(folder, "config.json", attn_implementation="someone/evil-attention")


def hidden_kernel(folder: Path, canary: Path) -> None:
    change(folder, "config.json", _attn_implementation={"": "paged|someone/evil-attention:run"})


def escaping_template(folder: Path, canary: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__['os'].system('touch " + str(canary) + "') }}"
    )


HOSTILE: dict[Callable[[Path, Path], None], tuple[str, str]] = {
    coded_config: ("brings its own code", FLAG),
    coded_config_of_another_repository: ("brings its own code", FLAG),
    coded_tokenizer: ("brings its own code", FLAG),
    pickled_weights: ("safetensors", "safetensors"),
    zipped_weights: ("safetensors", "safetensors"),
    indexed_weights: ("safetensors", "safetensors"),
    kernel: ("names the kernel 'someone/evil-attention'", FLAG),
    hidden_kernel: ("names the kernel 'paged|someone/evil-attention:run'", FLAG),
    escaping_template: ("the chat template", "jinja"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "root"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(ROW)
    return folder


@pytest.fixture(scope="module")
def finished(root: Path, command: Command) -> dict[str, Path]:
    """A run of one step with all weights, and one with an adapter."""
    runs = {"all": "adapter=none", "adapter": "adapter=lora"}
    for name, adapter in runs.items():
        done = command("train", root, *overrides(root), *ONE_STEP, adapter, f"output_dir={root}/{name}")
        assert done["code"] == 0, done["stderr"]
    return {name: root / name for name in runs}


def overrides(root: Path) -> tuple[str, ...]:
    return (*SMALL, f"data.train={root}/rows.jsonl", f"data.cache_dir={root.parent}/cache")


def assert_refused(answer: dict[str, Any], problem: str, remedy: str, canary: Path) -> None:
    assert not canary.exists(), "code of the folder has run"
    assert answer["code"] == 2, answer
    assert "Traceback" not in answer["stderr"]
    what, *rest = answer["stderr"].splitlines()
    assert len(rest) <= 2
    assert problem in what
    assert remedy in answer["stderr"]


@pytest.mark.row(30)
@pytest.mark.parametrize("plant", HOSTILE, ids=lambda plant: plant.__name__)
def test_training_runs_no_code_of_a_model_folder(
    plant: Callable[[Path, Path], None], root: Path, tmp_path: Path, command: Command
) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(TINY, folder)
    plant(folder, canary)
    model = ("model=hub", f"model.name_or_path={folder}", f"output_dir={tmp_path}/run")
    random = str(plant not in (pickled_weights, zipped_weights, indexed_weights)).lower()
    answer = command("train", root, *overrides(root), *ONE_STEP, *model, f"model.random_weights={random}")
    assert_refused(answer, *HOSTILE[plant], canary)
    assert not (tmp_path / "run").exists()


def pickled_adapter(folder: Path, canary: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle_that_touches(canary))


def importing_adapter(folder: Path, canary: Path) -> None:
    (folder.parent / "planted_adapter.py").write_text(f"open({str(canary)!r}, 'w')\n")
    change(folder, "adapter_config.json", megatron_config={"x": 1}, megatron_core="planted_adapter")


def another_kind_of_adapter(folder: Path, canary: Path) -> None:
    change(folder, "adapter_config.json", peft_type="XLORA", adapters={"0": f"{folder}"})


ADAPTERS: dict[Callable[[Path, Path], None], tuple[str, str]] = {
    pickled_adapter: (
        "adapter_model.safetensors is not there; a pickle such as adapter_model.bin is never read",
        "take",
    ),
    importing_adapter: ("megatron_config in adapter_config.json would import a module", "take the folder"),
    another_kind_of_adapter: ("the adapter is a 'XLORA'", "take the folder"),
    coded_tokenizer: ("brings its own code", FLAG),
}


ASKED = [
    *(("chat", "all", plant) for plant in HOSTILE),
    *(pytest.param("evaluate", "all", plant, marks=pytest.mark.slow) for plant in HOSTILE),
    *((script, "adapter", plant) for plant in ADAPTERS for script in ("chat", "export")),
]


@pytest.mark.row(28)
@pytest.mark.row(30)
@pytest.mark.parametrize(("script", "trained", "plant"), ASKED, ids=lambda value: getattr(value, "__name__", value))
def test_a_run_folder_runs_no_code_when_it_is_asked_or_merged(
    plant: Callable[[Path, Path], None],
    script: str,
    trained: str,
    root: Path,
    finished: dict[str, Path],
    tmp_path: Path,
    command: Command,
) -> None:
    run, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(finished[trained], run)
    plant(run / "model", canary)
    evaluated = [f"data={root}/rows.jsonl", "max_new_tokens=1"]
    more = {"chat": ["prompt=hello"], "evaluate": evaluated, "export": [f"out={tmp_path}/merged"]}[script]
    env = {"PYTHONPATH": str(run)} if trained == "adapter" else {}
    answer = command(script, root, f"run={run}", *more, env=env)
    assert_refused(answer, *(ADAPTERS if trained == "adapter" else HOSTILE)[plant], canary)
    assert not (tmp_path / "merged").exists()


@pytest.mark.row(28)
def test_other_pickles_of_a_folder_are_never_opened(root: Path, finished: dict[str, Path], command: Command) -> None:
    """training_args.bin, optimizer.pt and the like, which other trainers leave and read."""
    canary = root.parent / "canary"
    run = root.parent / "with_pickles"
    shutil.copytree(finished["adapter"], run)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"):
        (run / "model" / name).write_bytes(pickle_that_touches(canary))
    add_code(run / "model", canary)
    assert command("chat", root, f"run={run}", "prompt=hello", "max_new_tokens=1")["code"] == 0
    assert command("export", root, f"run={run}", f"out={root.parent}/merged")["code"] == 0
    assert not canary.exists()


def test_code_that_is_not_needed_is_not_run(root: Path, tmp_path: Path, command: Command) -> None:
    """auto_map beside an architecture that transformers knows: its own class is taken."""
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(TINY, folder)
    add_code(folder, canary)
    auto = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    change(folder, "config.json", auto_map=auto, trust_remote_code=True)  # noqa: TS006 - a JSON file
    model = ("model=hub", f"model.name_or_path={folder}", "model.random_weights=true", f"output_dir={tmp_path}/run")
    answer = command("train", root, *overrides(root), *ONE_STEP, *model)
    assert answer["code"] == 0, answer["stderr"]
    assert not canary.exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}",
    "{{ cycler.__init__.__globals__['os'].system('touch CANARY') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ self.__init__.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__base__.__subclasses__() }}",
    "{{ '{0.__globals__[os]}'.format(raise_exception).x.y }}",
    "{{ messages.append(messages[0]) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% for a in range(10 ** 9) %}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(template: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "evil.jinja"
    file.write_text(template.replace("CANARY", str(canary)))
    config = compose_config(["+exp=debug", f"data.chat_template={file}"]).config
    with pytest.raises(ConfigError, match="the chat template can't render one question and its answer"):
        load_tokenizer(config.model, config.data)
    assert not canary.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "a/b"},
        {"_attn_implementation": "a/b"},
        {"_attn_implementation_internal": "a/b"},
        {"experts_implementation": "a/b"},
        {"text_config": {"attn_implementation": {"": "sdpa", "vision": "a/b"}}},
        {"layers": [{"_experts_implementation": "a/b"}]},
    ],
)
def test_a_kernel_is_found_wherever_a_config_names_it(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | settings))
    with pytest.raises(ModelError, match=r"names the kernel 'a/b'"):
        check_kernels(str(tmp_path))


def test_ordinary_attention_is_no_kernel(tmp_path: Path) -> None:
    plain = {"attn_implementation": "sdpa", "_name_or_path": "owner/name", "_attn_implementation": None}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | plain))
    check_kernels(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_adapter_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config.json can't be read"):
        check_adapter(tmp_path)


@pytest.mark.parametrize("value", ["yes", "1", "null", "'true'", "on", "[true]"])
def test_the_flag_takes_true_and_false_only(value: str) -> None:
    with pytest.raises(ConfigError, match=r"model.trust_remote_code must be true or false"):
        compose_config(["+exp=debug", f"model.trust_remote_code={value}"])


def test_the_payloads_do_run_where_they_are_read(tmp_path: Path) -> None:
    """The control: both pickles leave their canary when they are read without weights_only."""
    for number, write in enumerate((pickled_weights, zipped_weights)):
        canary = tmp_path / f"canary-{number}"
        write(tmp_path, canary)
        with contextlib.suppress(Exception):  # torch cannot use what the payload gives back
            torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # noqa: TS001 - the control
        assert canary.exists()
