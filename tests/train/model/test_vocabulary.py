"""A tokenizer with more ids than the model has rows: one that is used is refused before weights are loaded, or its row
added and trained.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.train.answer import export
from tunesmith.train.config.compose import Composed, compose_config
from tunesmith.train.errors import ModelError
from tunesmith.train.model.load import load_model
from tunesmith.train.model.vocabulary import num_ids
from tunesmith.train.ranks.distributed import World
from tunesmith.train.run.run import _prepare
from tunesmith.train.track.reporter import Reporter

CPU = torch.device("cpu")
ROWS, ADDED = 2048, ["<ticket>", "<order>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def larger(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """larger(True) is a model with a tied head whose tokenizer has two tokens more than it has rows."""

    @cache
    def make(tied: bool) -> Path:
        folder = tmp_path_factory.mktemp("larger") / "model"
        shutil.copytree(make_model("llama", tie_word_embeddings=tied), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.add_tokens(ADDED) == len(ADDED)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    row = {"prompt": f"Where is {ADDED[1]} of {ADDED[0]}?", "completion": f"{ADDED[1]} is on its way."}
    path.write_text(f"{json.dumps(row)}\n" * 8)
    return path


def composed_of(folder: Path | str, *overrides: str) -> Composed:
    own = [f"model.name_or_path={folder}", "batch.sequence_length=64", "engine.precision=fp32", *overrides]
    return compose_config(["+exp=debug", "model=hub", *own])


class Notes(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.notes: list[Any] = []

    def note(self, text: Any) -> None:
        self.notes.append(text)


@pytest.fixture
def checked(records: Path, data_cache: Path) -> Callable[..., list[str]]:
    """checked(folder, *overrides) is what is noted of ids before weights are loaded; the data is the records."""

    def check(folder: Path, *overrides: str) -> list[str]:
        data = (f"data.train={records}", "data.validation=[]", f"data.cache_dir={data_cache}", "data.preview=0")
        rest, told = ("batch.packing=none", "evaluate.every_steps=null", *overrides), Notes()
        _prepare(composed_of(folder, *data, *rest), World(), CPU, told)
        return [text for text in told.notes if "has ids up to" in text]

    return check


def test_it_is_refused_before_weights_are_loaded(
    checked: Callable[..., list[str]], larger: Callable[[bool], Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(larger(False), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        checked(folder)
    assert f"has ids up to 2049, the model 2048 rows: '{ADDED[0]}', '{ADDED[1]}' would be" in caught.value.what
    assert caught.value.do is not None
    assert "model.resize_embeddings=true and adapter=none: 2 rows are added" in caught.value.do
    assert checked(folder, "model.resize_embeddings=true") == []
    assert checked(make_model()) == []


def test_an_id_that_the_run_never_uses_is_only_noted(
    checked: Callable[..., list[str]],
    larger: Callable[[bool], Path],
    records: Path,
    make_records: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """As of google/gemma-3-1b-it: 262144 rows, and an <image_soft_token> of the id 262144, which no text has."""
    other = f"data.train={make_records(8)}"
    (said,) = checked(larger(False), other)
    assert said.endswith("would be looked up beyond them, but this run has no such token.")
    with pytest.raises(ModelError, match=f"rows: '{ADDED[0]}', '{ADDED[1]}' would be looked up"):
        checked(larger(False), other, f"data.validation={records}", "evaluate.every_steps=1")
    folder = shutil.copytree(larger(False), tmp_path / "model")
    for role in ("pad", "eos"):
        tokenizer = AutoTokenizer.from_pretrained(larger(False))
        tokenizer.add_special_tokens({f"{role}_token": ADDED[0]})
        tokenizer.save_pretrained(folder)
        with pytest.raises(ModelError, match=f"2048 rows: '{ADDED[0]}' would be looked up"):
            checked(folder, other)


@pytest.mark.parametrize("adapter", ["lora", "last_layers"])
def test_rows_that_an_adapter_would_leave_untrained_are_refused(
    adapter: str, checked: Callable[..., list[str]], larger: Callable[[bool], Path]
) -> None:
    more = ["adapter.num_layers=1"] if adapter == "last_layers" else []
    with pytest.raises(ModelError, match=f"would get rows that adapter={adapter} neither trains nor saves") as caught:
        checked(larger(False), "model.resize_embeddings=true", f"adapter={adapter}", *more)
    assert caught.value.at == "model.resize_embeddings"


@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_stay_and_new_ones_are_their_mean(tied: bool, larger: Callable[[bool], Path]) -> None:
    config = composed_of(larger(tied), "model.resize_embeddings=true").config
    model = load_model(config, World(), num_ids=ROWS + 2)
    base = load_file(larger(tied) / "model.safetensors")
    for module, name in ((model.get_input_embeddings(), EMBEDDING), (model.get_output_embeddings(), HEAD)):
        old = base[EMBEDDING if tied else name]
        assert torch.equal(module.weight[:ROWS], old)
        torch.testing.assert_close(module.weight[ROWS:], old.mean(0).expand(2, -1), rtol=1e-5, atol=1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    small = load_model(config, World(), num_ids=ROWS - 1)  # rows are never taken away
    assert small.get_input_embeddings().num_embeddings == ROWS


def trained(rank: Any, overrides: list[str], folder: str) -> dict[str, Any]:
    """On every rank: a few steps with the new tokens in the data, and the model written."""
    with rank.ready(overrides) as (loop, recorder):
        loop.train()
        export.write(loop.session.engine, loop.run.tokenizer, loop.run.config, Path(folder))
        _, logits = export.probe(loop.session.engine)
        return {"losses": recorder.losses, "logits": logits.tolist()}


QUICK = ((2, False), (3, True))
STAGES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in product(range(4), (True, False))
]


@pytest.mark.parametrize(("stage", "tied"), STAGES)
def test_new_rows_are_trained_saved_and_opened_again(
    stage: int,
    tied: bool,
    larger: Callable[[bool], Path],
    records: Path,
    ranks: Any,
    short_run: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    data = (
        f"data.train={records}",
        "optimizer.weight_decay=0",
        "checkpoint.at_end=false",
        "optimizer.learning_rate=1e-2",
    )
    overrides = short_run(stage, 3, *data, "model.resize_embeddings=true", model=larger(tied), splits_all=True)
    found, other = ranks(2).run(trained, overrides=overrides, folder=str(tmp_path / "model"))
    assert found == other
    live = torch.tensor(found["logits"])
    assert live.shape[1] == ROWS + 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == num_ids(AutoTokenizer.from_pretrained(tmp_path / "model")) == ROWS + 2
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert export.relative_error(model(input_ids=export.probe_ids(model)).logits[0], live) < 1e-4
    base = load_file(larger(tied) / "model.safetensors")
    for module, name in ((model.get_input_embeddings(), EMBEDDING), (model.get_output_embeddings(), HEAD)):
        moved = (module.weight[ROWS:] - base[EMBEDDING if tied else name].mean(0)).abs().amax(1)
        assert (moved > 1e-3).all()  # without weight decay: by their own gradient
    assert found["losses"][-1] < found["losses"][0]
