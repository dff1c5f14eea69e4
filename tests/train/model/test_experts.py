"""Mixtures of experts: loaded split, trained at every stage, written as they were published, opened and merged."""

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.train.answer import export
from tunesmith.train.answer.merge import merge
from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import ModelError
from tunesmith.train.files.run_folder import create
from tunesmith.train.model import load
from tunesmith.train.run.summary import start_rows
from tunesmith.train.zero.sharding import gathered

SPLIT_ALL = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


def composed(folder: Path, *overrides: str) -> Any:
    common = ["+exp=debug", "model=hub", f"model.name_or_path={folder}", "batch.sequence_length=64"]
    return compose_config([*common, "engine=zero3", "engine.precision=fp32", SPLIT_ALL, *overrides]).config


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loaded_split(rank: Any, folder: str) -> dict[str, Any]:
    """On every rank: what ZeRO 3's loader makes of files, against from_pretrained."""
    model = load.load_model(composed(Path(folder)), rank.world)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected, found = whole.state_dict(), dict(model.named_buffers()) | dict(model.named_parameters())
    different = []
    for name in expected:
        with gathered([found[name]]):
            if not torch.equal(found[name], expected[name]):
                different.append(name)
    used = [len(it._weight_conversions) for it in (model, whole)]
    return {"different": different, "names": len(expected), "used": used}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_zero3_fuses_published_experts_as_transformers_does(family, ranks, make_experts, tmp_path):
    published = make_experts(family, **({"num_local_experts": 11} if family == "mixtral" else {}))  # 10 comes after 9
    AutoModelForCausalLM.from_pretrained(published).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5  # the experts of a layer lie in more than one file
    assert weights_of(tmp_path).keys() == weights_of(published).keys()
    for answer in ranks(2).run(loaded_split, folder=str(tmp_path)):
        assert answer["different"] == []
        assert answer["names"] > 20
        assert answer["used"][0] == answer["used"][1]  # what it is written with again


def refusal(rank: Any, folder: str) -> str:
    try:
        load.load_model(composed(Path(folder)), rank.world)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("drops", "words"),
    [
        ("experts.2.up_proj.weight", "do not go together"),
        ("experts.", "model.layers.0.mlp.experts.gate_up_proj is not in the weights of"),
        ("experts.3.", "down_proj has shape [3, 32, 16]; the model wants [4, 32, 16]"),
    ],
)
def test_an_absent_expert_is_refused_on_every_rank(drops, words, ranks, make_experts, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_experts("qwen3_moe"), folder)
    kept = {name: tensor for name, tensor in weights_of(folder).items() if f"layers.0.mlp.{drops}" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for text in ranks(2).run(refusal, folder=str(folder)):
        assert words in text


def trained(rank: Any, overrides: list[str], folder: str) -> dict[str, Any]:
    """On every rank: two steps, the model written, opened, compared, and put back into the live one."""
    with rank.ready(overrides) as (loop, recorder):
        loop.train()
        engine, config = loop.session.engine, loop.run.config
        export.write(engine, loop.run.tokenizer, config, Path(folder))
        ids, logits = export.probe(engine)
        words = export.verify(Path(folder), config, ids, logits) if rank.world.rank == 0 else ""
        with torch.no_grad():
            for parameter in (p for p in engine.module.parameters() if p.requires_grad):
                with gathered([parameter], write=True):
                    parameter.zero_()
        export.restore(engine, config, Path(folder))
        restored = export.probe(engine)[1]
        answer = {"losses": recorder.losses, "restored": bool((restored == logits).all()), "words": words}
        return answer | {"shown": [line for _, line in start_rows(loop.run, loop.session)]}


WIDE = [
    (family, adapter) for family in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss") for adapter in ("none", "lora")
]
QUICK = [("qwen3_moe", "none"), ("deepseek_v3", "lora"), ("gpt_oss", "lora")]


@pytest.mark.parametrize(
    ("family", "adapter", "stages"),
    [(*it, [3]) for it in QUICK] + [pytest.param(*it, [0, 1, 2, 3], marks=pytest.mark.slow) for it in WIDE],
)
def test_experts_are_trained_and_written_as_published(
    family, adapter, stages, ranks, short_run, make_experts, tmp_path
):
    published, losses = make_experts(family), []
    for stage in stages:
        overrides = short_run(
            stage, 2, f"adapter={adapter}", "batch.packing=none", "checkpoint.at_end=false",
            model=published, splits_all=True,
        )  # fmt: skip
        run_dir = tmp_path / str(stage)
        answers = ranks(2).run(trained, overrides=overrides, folder=str(run_dir / "model"))
        assert all(answer["restored"] for answer in answers)
        assert "weights equal, logits within" in answers[0]["words"]
        assert any(line.startswith("mlp.experts.down_proj: ") for line in answers[0]["shown"]) == (adapter == "lora")
        losses.append(answers[0]["losses"])
        if adapter == "lora":
            create(run_dir, yaml.safe_dump(compose_config(overrides).resolved))
            merge(run_dir, run_dir / "merged")
        written = weights_of(run_dir / ("merged" if adapter == "lora" else "model"))
        before = weights_of(published)
        assert written.keys() == before.keys()
        assert all(written[name].shape == before[name].shape for name in before)
        moved = [name for name in before if "experts" in name and not torch.equal(written[name], before[name])]
        assert len(moved) >= 4
    assert all(it == pytest.approx(losses[0], rel=1e-5) for it in losses)


@pytest.fixture(scope="module")
def mxfp4(make_experts, tmp_path_factory) -> Path:
    """gpt-oss as OpenAI publishes it: of the experts' weights, two numbers of four bits a byte, and a scale for 32."""
    folder = tmp_path_factory.mktemp("mxfp4") / "model"
    shutil.copytree(make_experts("gpt_oss"), folder)
    generator, published = torch.Generator().manual_seed(0), {}
    for name, tensor in weights_of(folder).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            published[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32)  # experts, out, in
        published[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        published[f"{name}_scales"] = torch.randint(119, 123, shape, generator=generator, dtype=torch.uint8)
    save_file(published, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("adapter", ["none", "lora", pytest.param("last_layers", marks=pytest.mark.slow)])
def test_what_was_read_from_mxfp4_is_written_dense(adapter, mxfp4, ranks, short_run, make_experts, tmp_path):
    more = ["adapter.num_layers=1"] if adapter == "last_layers" else []
    overrides = short_run(
        2, 2, f"adapter={adapter}", *more, "batch.packing=none", "checkpoint.at_end=false", model=mxfp4
    )
    run_dir = tmp_path / "run"
    answer = ranks(1).run(trained, overrides=overrides, folder=str(run_dir / "model"))[0]
    assert answer["restored"]
    assert "weights equal, logits within" in answer["words"]
    finished = run_dir / "model"
    if adapter == "lora":
        create(run_dir, yaml.safe_dump(compose_config(overrides).resolved))
        merge(run_dir, finished := run_dir / "merged")
    dense = make_experts("gpt_oss")
    written = weights_of(finished)
    assert {name: it.shape for name, it in written.items()} == {n: it.shape for n, it in weights_of(dense).items()}
    assert "quantization_config" not in json.loads((finished / "config.json").read_text())
    opened = AutoModelForCausalLM.from_pretrained(finished).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in written.items())


def first_imported(rank: Any, folder: str) -> dict[str, Any]:
    """On every rank: a split gpt-oss, loaded before its modelling code is imported; and one made after."""
    package = importlib.import_module("transformers.models.gpt_oss")
    for name in [
        name for name in vars(package) if ("Oss" in name and "Config" not in name) or name.startswith("modeling")
    ]:
        delattr(package, name)
    del sys.modules["transformers.models.gpt_oss.modeling_gpt_oss"]
    real, defined = load.sharded_init, []

    @contextlib.contextmanager
    def watched(*arguments: Any) -> Iterator[None]:
        with real(*arguments):
            before = set(_kinds(nn.Module))
            yield
            defined.extend(kind.__name__ for kind in set(_kinds(nn.Module)) - before)

    load.sharded_init = watched  # type: ignore[assignment]
    try:
        model = load.load_model(composed(Path(folder)), rank.world)
    finally:
        load.sharded_init = real
    after = AutoModelForCausalLM.from_config(model.config)
    return {"defined": defined, "has_config": hasattr(after.model.layers[0].mlp.experts, "config")}


def _kinds(kind: type) -> Iterator[type]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _kinds(inner)


def test_no_class_is_first_imported_where_zero3_wraps_classes(ranks, make_experts):
    folder = make_experts("gpt_oss")
    ranks(2).run(refusal, folder=str(folder))  # imported once, so that it can be forgotten
    for answer in ranks(2).run(first_imported, folder=str(folder)):
        assert answer == {"defined": [], "has_config": True}
