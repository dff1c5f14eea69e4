"""What every test needs: tiny models and data; GPU tests say why they are skipped where there is none."""

import gc
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests and their ranks share the cores

import pytest
import torch
from zygote import Zygote

TINY = Path(__file__).parents[1] / "conf/model/tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TORTURE_TABLE = Path(__file__).parent / "torture/table.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture-table", type=Path, help="write what became of each row of the torture table here")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job, whose children would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    target = config.getoption("--torture-table")
    if target and not hasattr(config, "workerinput"):  # on the controller, where every worker's reports arrive
        spec = importlib.util.spec_from_file_location("torture_table", TORTURE_TABLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        config.pluginmanager.register(module.TortureTable(target))


@pytest.fixture
def happened(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """happened("found in 1.2 s") is a test's figure for the torture table."""
    return lambda text: record_property("happened", text)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the collector need not look at what the imports made, again and again


@pytest.hookimpl(trylast=True)  # after the order was shuffled
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("cold") is None)  # the longest first: no worker waits for one
    for item in items:
        item.user_properties += [("row", mark.args[0]) for mark in item.iter_markers("row")]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none"))


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """A model of two layers for the tokenizer that ships with Tunesmith."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # a wide start: attention is far from uniform, and a leak between records would show
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    return AutoConfig.for_model(model_type, **(sizes | changes))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model("qwen2", num_hidden_layers=1) is a folder with seeded random weights and a tokenizer."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **changes: Any) -> Path:
        from transformers import AutoModelForCausalLM

        key = json.dumps([model_type, changes])
        if key not in made:
            made[key] = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start at 1 and 0: nothing multiplied with 0 would show
                    parameter.data += torch.randn_like(parameter) / 10
            model.save_pretrained(made[key])
            for name in TOKENIZER_FILES:
                shutil.copy(TINY / name, made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_records(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_records(47) is a JSONL file of conversations of uneven lengths, with assistant weights of 0 to 2."""

    @cache
    def make(num_records: int, *, seed: int = 0, max_words: int = 8) -> Path:
        lots = random.Random(seed)
        words = "pot leaf seed water soil light app ring root sun moss fern lamp dry wet cold warm bloom"

        def sentence() -> str:
            return " ".join(lots.choices(words.split(), k=lots.randint(1, max_words)))

        rows = []
        for _ in range(num_records):
            messages: list[dict[str, Any]] = []
            for turn in range(lots.choice((1, 1, 2))):
                weight = lots.choice((0.25, 1.0, 2.0)) if turn == 0 else lots.choice((0, 0.5))
                messages.append({"role": "user", "content": sentence()})
                messages.append({"role": "assistant", "content": sentence(), "weight": weight})
            rows.append(json.dumps({"messages": messages}))
        path = tmp_path_factory.mktemp("records") / "records.jsonl"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data-cache")


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    started = Zygote(tmp_path_factory.mktemp("zygote"))
    yield started
    started.stop()
