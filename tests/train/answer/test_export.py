"""What a run leaves behind is what was live: files, PEFT, transformers, merging; and a difference is noticed."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from matrices import covered
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.train.answer import export
from tunesmith.train.answer.merge import merge
from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.files.run_folder import create

SMALL = [
    "batch.sequence_length=128",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=1",
    "schedule.max_steps=4",
    "optimizer.learning_rate=0.02",
    "optimizer.max_grad_norm=null",
    "evaluate.every_steps=null",
    "data.validation=[]",
    "checkpoint.at_end=false",
    "checkpoint.every_steps=null",
]


def train_and_write(rank, overrides: list[str], folder: str) -> list[list[float]]:
    """On every rank: a few steps, then the model written; the live logits on the probe."""
    with rank.ready(overrides) as (loop, _):
        loop.train()
        export.write(loop.session.engine, loop.run.tokenizer, loop.run.config, Path(folder))
        _, logits = export.probe(loop.session.engine)
        return logits.tolist()


@pytest.fixture
def written(ranks, make_model, make_records, data_cache, tmp_path):
    """written(2, "adapter=lora") trains on two ranks: (folder, config, live logits [P, V])."""

    def make(world_size: int, *overrides: str, model: Path | None = None):
        everything = [
            "+exp=debug",
            "model=hub",
            f"model.name_or_path={model or make_model()}",
            f"data.train={make_records(40)}",
            f"data.cache_dir={data_cache}",
            *SMALL,
            *overrides,
        ]
        folder = tmp_path / "run" / "model"
        logits = ranks(world_size).run(train_and_write, overrides=everything, folder=str(folder))
        composed = compose_config(everything)
        import yaml

        create(tmp_path / "run", yaml.safe_dump(composed.resolved))
        return folder, composed.config, torch.tensor(logits[0])

    return make


KINDS = [
    (),
    ("adapter=lora",),
    ("adapter=rslora", "adapter.r=4"),
    ("adapter=dora",),
    ("adapter=last_layers", "adapter.num_layers=1"),
]


@pytest.mark.parametrize(
    ("kind", "engine"),
    covered(
        itertools.product(KINDS, ("zero1", "zero3")),
        [(KINDS[0], "zero3"), (KINDS[1], "zero1"), (KINDS[3], "zero3"), (KINDS[4], "zero1")],
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "full",
)
def test_the_saved_model_reads_back_with_the_live_weights_and_logits(kind, engine, written):
    threshold = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    folder, config, live = written(2, f"engine={engine}", "engine.precision=fp32", threshold, *kind)
    ids = export.probe_ids(AutoModelForCausalLM.from_pretrained(config.model.name_or_path))
    words = export.verify(folder, config, ids, live)
    assert "weights equal, logits within" in words
    untouched = AutoModelForCausalLM.from_pretrained(config.model.name_or_path)(input_ids=ids).logits[0]
    assert export.relative_error(live, untouched) > 0.01  # the training has moved it: an empty adapter would show


# 2026-11: PEFT 0.21.2 asks transformers 5.23 by a name it has deprecated.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_loads_in_peft_alone_and_b_has_moved(written):
    folder, config, live = written(2, "engine=zero2", "engine.precision=fp32", "adapter=lora")
    base = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    logits = model(input_ids=export.probe_ids(base)).logits[0]
    assert export.relative_error(logits, live) < 1e-5
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weight.norm() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert all("lora_" in name and ".default" not in name for name in weights)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(("adapter", "scale"), [("lora", 32 / 4), ("rslora", 16 / math.sqrt(4))])
def test_the_scale_is_alpha_over_r_or_its_root_in_the_merged_weights(adapter, scale, written, tmp_path):
    folder, config, _ = written(1, "engine=ddp", "engine.precision=fp32", f"adapter={adapter}", "adapter.r=4")
    merge(folder.parent, tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(Path(config.model.name_or_path) / "model.safetensors")
    weights = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + scale * (b @ a), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_merging_keeps_the_adapters_logits(tied, written, make_model, tmp_path):
    model = make_model("llama", tie_word_embeddings=tied)
    folder, _, live = written(1, "engine=ddp", "engine.precision=fp32", "adapter=lora", model=model)
    merge(folder.parent, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == tied
    assert export.relative_error(merged(input_ids=export.probe_ids(merged)).logits[0], live) < 1e-5


def test_merging_an_adapted_head_unties_it(written, make_model, tmp_path):
    overrides = ("engine=ddp", "engine.precision=fp32", "adapter=lora", "adapter.target_modules=[lm_head,up_proj]")
    folder, _, live = written(1, *overrides, model=make_model("llama", tie_word_embeddings=True))
    merge(folder.parent, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert export.relative_error(merged(input_ids=export.probe_ids(merged)).logits[0], live) < 1e-5


def test_a_full_model_is_not_merged(written, tmp_path):
    folder, _, _ = written(1, "engine=ddp")
    with pytest.raises(ConfigError, match="full model already"):
        merge(folder.parent, tmp_path / "merged")


def test_a_changed_weight_is_noticed(written):
    folder, config, live = written(1, "engine=ddp", "engine.precision=fp32")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"1 saved weights differ from the live ones: \['model.norm.weight'\]"):
        export.verify(folder, config, torch.zeros(1, 4, dtype=torch.int64), live)


def test_a_config_that_gives_other_logits_is_noticed(written):
    folder, config, live = written(1, "engine=ddp", "engine.precision=fp32")
    changed = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1.0}
    (folder / "config.json").write_text(json.dumps(changed))
    ids = export.probe_ids(AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(TrainingError, match="other logits"):
        export.verify(folder, config, ids, live)


def test_large_models_are_written_in_shards_that_transformers_reads(monkeypatch, make_model, tmp_path):
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    source = make_model()
    weights = load_file(source / "model.safetensors")
    writer = export.ShardWriter(tmp_path, "model")
    for name, tensor in weights.items():
        writer.add(name, tensor)
    writer.close()
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    reread = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(reread[name], tensor) for name, tensor in weights.items())
