"""Under ZeRO 3 a rank holds its part of every weight and no more, before a step and after it.

DeepSpeed 0.19.3 changed how weights gathered for the recomputation of gradient checkpointing are released; frozen ones
were reported to stay whole from then on: https://github.com/deepspeedai/DeepSpeed/pull/8148.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

NUM_LAYERS = 4


def held_bytes(module: Any) -> int:
    """Bytes of whole weights that this rank holds, besides its parts."""
    return sum(parameter.data.numel() * parameter.element_size() for parameter in module.parameters())


def residency(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: bytes of whole weights held before and after each of some steps and an evaluation."""
    from tunesmith.train.model.adapter import transformer_blocks

    with rank.ready(overrides) as (loop, _):
        module = loop.session.engine.module
        within: list[int] = []
        for linear in (m for name, m in module.named_modules() if name.endswith(".down_proj")):
            linear.register_forward_pre_hook(lambda *_: within.append(held_bytes(module)))
        before = held_bytes(module)
        steps = []
        for _ in range(3):
            loop.step()
            steps.append(held_bytes(module))
        num_forwards, most_within = len(within), max(within)
        rank.evaluate(loop, 2)
        return {
            "whole": sum(parameter.ds_numel * parameter.element_size() for parameter in module.parameters()),
            "parts": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in module.parameters()),
            "before": before,
            "steps": steps,
            "after_evaluation": held_bytes(module),
            "block": sum(p.ds_numel * p.element_size() for p in transformer_blocks(module)[0].parameters()),
            "most_within": most_within,
            "num_forwards": num_forwards,
            "states": sorted({parameter.ds_status.name for parameter in module.parameters()}),
        }


@pytest.mark.parametrize(
    ("adapter", "checkpointing"),
    covered(
        [
            ("lora", "true"),
            ("dora adapter.dropout=0.1", "true"),
            ("none", "true"),
            ("last_layers adapter.num_layers=1", "true"),
            ("lora", "false"),
            ("none", "false"),
        ],
        [("lora", "true")],
    ),
)
def test_gathered_weights_are_released_again(
    ranks: Callable[[int], Any],
    short_run: Callable[..., list[str]],
    make_model: Callable[..., Path],
    adapter: str,
    checkpointing: str,
) -> None:
    own = [f"memory={'recompute' if checkpointing == 'true' else 'keep'}", *f"adapter={adapter}".split()]
    model = make_model(num_hidden_layers=NUM_LAYERS)
    overrides = short_run(3, 3, *own, "checkpoint.at_end=false", model=model, splits_all=True)
    for found in ranks(2).run(residency, overrides=overrides):
        assert found["whole"] / 2 <= found["parts"] < found["whole"] / 2 * 1.02  # two ranks, and a little padding
        assert found["before"] == 0
        assert found["steps"] == [0, 0, 0]
        assert found["after_evaluation"] == 0
        assert found["states"] == ["NOT_AVAILABLE"]
        assert 0 < found["most_within"] <= found["block"]  # one block at a time, not the model
        steps_and_forwards = 3 * 2 * NUM_LAYERS
        assert found["num_forwards"] == steps_and_forwards * (2 if checkpointing == "true" else 1)  # recomputed
