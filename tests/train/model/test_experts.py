"""Mixtures of experts: loaded whole and split, trained, written as they were published, and opened again."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tunesmith.train.answer import export

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


def trained(rank: Any, overrides: list[str], folder: str) -> dict[str, Any]:
    """On every rank: a few steps, the model written and put back; losses, and the live logits on the probe."""
    with rank.ready(overrides) as (loop, recorder):
        loop.train()
        engine, config = loop.session.engine, loop.run.config
        export.write(engine, loop.run.tokenizer, config, Path(folder))
        ids, logits = export.probe(engine)
        export.restore(engine, config, Path(folder))
        _, restored = export.probe(engine)
        words = export.verify(Path(folder), config, ids, logits) if rank.world.rank == 0 else ""
        return {"losses": recorder.losses, "logits": logits.tolist(), "restored": restored.tolist(), "words": words}


def names_in(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts(family, stage, adapter, ranks, short_run, make_experts, tmp_path):
    model = make_experts(family)
    own = [f"adapter={adapter}", "batch.packing=none"]
    overrides = short_run(stage, 2, *own, model=model, splits_all=True)
    for answer in ranks(2).run(trained, overrides=overrides, folder=str(tmp_path / "model")):
        assert answer["logits"] == answer["restored"]
    if adapter == "none":
        assert names_in(tmp_path / "model") == names_in(model)
