"""Loading: whole and split, tied and untied, strict about what is missing, and no code unasked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Config
from tunesmith.train.errors import ModelError
from tunesmith.train.model.adapter import transformer_blocks
from tunesmith.train.model.load import load_base, load_model
from tunesmith.train.model.size import model_size
from tunesmith.train.ranks.distributed import World
from tunesmith.train.zero.sharding import full_shape, gathered, is_split

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
SHARDED = (
    "engine=zero3",
    "engine.precision=fp32",
    "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
)


def config_for(model: Path, *overrides: str) -> Config:
    return compose_config(
        ["+exp=debug", "model=hub", f"model.name_or_path={model}", "batch.sequence_length=64", *overrides]
    ).config


def load_split(rank, folder: str) -> dict[str, Any]:
    """On every rank: the split model against the whole one, and how much of it this rank ever held."""
    model = load_model(config_for(Path(folder), *SHARDED), rank.world)
    unsplit = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole, buffers = dict(unsplit.named_parameters()), dict(unsplit.named_buffers())
    rounded = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    held = sum(p.ds_tensor.numel() for p in model.parameters())
    total = difference = 0.0
    for name, parameter in model.named_parameters():
        assert is_split(parameter)
        assert parameter.numel() == 0
        total += whole[name].numel()
        with gathered([parameter]):
            assert full_shape(parameter) == tuple(whole[name].shape)
            difference = max(difference, float((parameter - whole[name]).abs().max()))
    count = len(list(model.parameters()))
    return {"difference": difference, "held": held / total, "parameters": count, "rounded": rounded}


@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_loads_the_same_weights_with_half_of_them_on_each_rank(family, ranks, make_model):
    for answer in ranks(2).run(load_split, folder=str(make_model(family))):
        assert answer["difference"] == 0
        assert answer["rounded"] == []  # rotary frequencies, which DeepSpeed may make in bfloat16
        assert 0.5 <= answer["held"] < 0.55
        assert answer["parameters"] > 10


def test_zero3_reads_names_without_the_base_models_prefix(ranks, make_model, tmp_path):
    folder = tmp_path / "gpt2"
    shutil.copytree(make_model("gpt2"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert [answer["difference"] for answer in ranks(2).run(load_split, folder=str(folder))] == [0, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_one_parameter_and_count_once(tied, make_model):
    folder = make_model("llama", tie_word_embeddings=tied)
    model = load_base(config_for(folder, "engine.precision=fp32"))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    embedding = 2048 * 32
    size = model_size(model)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.matmul == size.parameters - (0 if tied else embedding) - 5 * 32  # five norm vectors


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_weights_are_loaded_in_the_target_dtype(precision, dtype, make_model):
    model = load_base(config_for(make_model(), f"engine.precision={precision}"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_random_weights_come_from_the_seed():
    one, two, other = (
        load_base(compose_config(["+exp=debug", f"seed={seed}"]).config).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_a_missing_weight_is_an_error_not_a_random_number(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in the files .* model.layers.1.mlp.up_proj.weight"):
        load_base(config_for(folder))


def test_code_in_a_model_folder_does_not_run_unasked(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    canary = tmp_path / "canary"
    (folder / "custom.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        load_base(config_for(folder))
    assert not canary.exists()


def test_only_the_last_blocks_are_trained(make_model):
    model = load_model(config_for(make_model(), "adapter=last_layers", "adapter.num_layers=1"), World())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")}
    assert len(transformer_blocks(model)) == 2


def test_lora_trains_every_linear_layer_but_the_head(make_model):
    model = load_model(config_for(make_model(), "adapter=lora"), World())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name in trained)


def test_recomputing_is_switched_on(make_model):
    model = load_model(config_for(make_model(), "memory=recompute"), World())
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
