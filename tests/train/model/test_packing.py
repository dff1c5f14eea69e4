"""Whether a model keeps packed records apart is known from its config, and batch.packing=auto goes by it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.train.checkpoint import fingerprint
from tunesmith.train.config.compose import Composed, compose_config
from tunesmith.train.config.config import Packing
from tunesmith.train.errors import ModelError
from tunesmith.train.model.load import check_model
from tunesmith.train.model.packing import settle
from tunesmith.train.ranks.distributed import World
from tunesmith.train.run.run import _prepare
from tunesmith.train.track.reporter import Reporter

TINY = Path(__file__).parents[3] / "conf/model/tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CPU = torch.device("cpu")
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
QWEN3_NEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LEAKING: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    # Only its third layer leaks: a twin has as many layers as show each kind.
    "lfm2": {"layer_types": ["full_attention"] * 2 + ["conv", "full_attention"], "num_hidden_layers": 4},
    "falcon": {"ffn_hidden_size": 64, "num_kv_heads": 4},
    "bloom": {},
    "qwen3_next": QWEN3_NEXT,
}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": GPT_OSS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
QUICK = ("lfm2",)


@pytest.fixture
def model_of(make_model: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """model_of("falcon") is a tiny model of a family."""

    def make(family: str) -> Path:
        sizes = {**LEAKING, **PACKED}[family]
        if family != "falcon":
            return make_model(family, **sizes)
        own = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        own |= {"eos_token_id": 2, "bos_token_id": None, "initializer_range": 0.2}
        folder = tmp_path / family  # its head_dim follows from others and cannot be set, as make_model sets it
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own, **sizes)).save_pretrained(folder)
        for name in TOKENIZER_FILES:
            shutil.copy(TINY / name, folder)
        return folder

    return make


def some(families: dict[str, dict[str, Any]], quick: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in families]


def command(model: Path) -> list[str]:
    return ["+exp=debug", "model=hub", f"model.name_or_path={model}", "batch.sequence_length=96"]


def composed_of(model: Path, *overrides: str) -> Composed:
    return compose_config([*command(model), *overrides])


def chosen(model: Path, *overrides: str) -> tuple[Packing, list[str]]:
    config, notes = composed_of(model, *overrides).config, list[str]()
    settle(config, check_model(config), CPU, notes.append)
    return config.batch.packing, notes


@pytest.mark.parametrize("family", LEAKING)
def test_a_model_that_cannot_keep_records_apart_is_trained_unpacked_and_says_so(
    family: str, model_of: Callable[[str], Path]
) -> None:
    model = model_of(family)
    packing, notes = chosen(model)
    assert packing is Packing.none
    assert len(notes) == 1
    assert notes[0].startswith(f"{model} with ")
    assert "lets packed records see each other" in notes[0]
    with pytest.raises(ModelError, match="lets packed records see each other") as caught:
        chosen(model, "batch.packing=best_fit")
    assert caught.value.do == "set batch.packing=none, or try another model.attention."
    assert chosen(model, "batch.packing=none") == (Packing.none, [])


def test_attention_in_segments_is_refused_where_a_model_cannot_have_it(model_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="has other logits with attention inside segments") as caught:
        chosen(model_of("lfm2"), "model.attention=segments")
    assert caught.value.do == "set model.attention=auto."


@pytest.mark.parametrize("family", PACKED)
def test_a_model_that_keeps_records_apart_is_packed(family: str, model_of: Callable[[str], Path]) -> None:
    model = model_of(family)
    assert chosen(model) == chosen(model, "batch.packing=best_fit") == (Packing.best_fit, [])


def test_a_model_of_full_size_is_asked_through_a_small_twin(tmp_path: Path) -> None:
    """Llama 3.1 70B's own sizes, and no weights there at all."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = AutoConfig.for_model("llama", vocab_size=128256, num_key_value_heads=8, eos_token_id=128001, **sizes)
    config.save_pretrained(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert chosen(tmp_path) == (Packing.best_fit, [])
    assert torch.equal(torch.get_rng_state(), before)  # a run's random weights stay the ones of its seed


def test_a_model_that_cannot_be_tried_is_trained_unpacked_unless_packing_is_asked_for(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Multi-head attention of 3 dimensions a head has no rotary halves, at any size."""
    model = make_model()
    config = check_model(composed_of(model).config)
    config.num_attention_heads, config.head_dim, notes = 4, 3, list[str]()
    composed = composed_of(model)
    settle(composed.config, config, CPU, notes.append)
    assert composed.config.batch.packing is Packing.none
    assert "is not known before it is loaded" in notes[0]
    composed.config.batch.packing = Packing.best_fit
    settle(composed.config, config, CPU, notes.append)
    assert composed.config.batch.packing is Packing.best_fit


def prepared(model: Path, records: Path, cache: Path, packing: str) -> tuple[str, Any, bool, Any]:
    """On one rank, before the ranks meet: the data's key, what a checkpoint compares, and what is written down."""
    data = [f"data.train={records}", "data.validation=[]", f"data.cache_dir={cache}", "evaluate.every_steps=null"]
    composed = composed_of(model, f"batch.packing={packing}", *data)
    _, _, found = _prepare(composed, World(), CPU, Reporter(None))
    identity = fingerprint.identity(composed.config, World(), found.fingerprint, found.parts)
    return (found.fingerprint, identity.fingerprint, found.train.is_packed, yaml.safe_dump(composed.resolved["batch"]))


@pytest.mark.parametrize(("family", "same_as"), [("llama", "best_fit"), ("lfm2", "none")])
def test_cache_checkpoint_and_run_folder_know_what_auto_came_to(
    family: str, same_as: str, model_of: Callable[[str], Path], make_records: Callable[..., Path], data_cache: Path
) -> None:
    model = model_of(family)
    auto, asked = (prepared(model, make_records(40), data_cache, packing) for packing in ("auto", same_as))
    assert auto == asked
    assert auto[1]["batch.packing"] == same_as
    assert auto[2] is (same_as == "best_fit")
    assert f"packing: {same_as}\n" in auto[3]


def first_run(rank: Any, overrides: list[str], folder: str) -> dict[str, Any]:
    """On a rank: a run from its first step to its written model, opened again and compared."""
    from tunesmith.train.run.finish import finish

    with rank.ready(overrides, folder) as (loop, recorder):
        loop.run.run_dir.mkdir(parents=True)
        loop.train()
        summary = finish(loop.run, loop.session, loop.stop)
        return {"losses": recorder.losses, "notes": recorder.notes, "saved": summary["model"]["saved"]}


@pytest.mark.parametrize("family", some(LEAKING, QUICK))
def test_the_default_first_command_trains_such_a_model_to_the_end(
    family: str, model_of: Callable[[str], Path], make_records: Callable[..., Path], ranks: Any, tmp_path: Path
) -> None:
    model = model_of(family)
    records = make_records(12)
    data = [f"data.train={records}", f"data.validation={records}", f"data.cache_dir={tmp_path}/cache"]
    overrides = [*command(model), *data, "schedule.max_steps=2"]
    (found,) = ranks(1).run(first_run, overrides=overrides, folder=str(tmp_path / "run"))
    assert len(found["losses"]) == 2
    assert any("each record gets a sequence of its own" in str(note) for note in found["notes"])
    assert "weights equal, logits within" in found["saved"]
