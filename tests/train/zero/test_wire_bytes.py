"""What ZeRO puts on the wire, counted on two ranks: the formulas of docs/scaling.md (bench/scaling_model.py)."""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).parents[3] / "bench/scaling_model.py"
FORWARDS = 2  # of short_run(): 8 sequences a step on two ranks, two a forward
LARGE = 200  # elements; counts, votes and norms are fewer
QUICK = [(3, "none"), (2, "lora")]


def sent_in_a_step(rank: Any, overrides: list[str]) -> tuple[float, int, int, int]:
    """On a rank: bytes that the collectives of a step send, and elements: trained ones, all, of embeddings and head."""
    import math

    import torch.distributed as dist
    from deepspeed.comm import comm

    from tunesmith.train.zero.sharding import full_shape

    share = (dist.get_world_size() - 1) / dist.get_world_size()
    sent: list[float] = []

    def counted(call: Callable[..., Any], times: int) -> Callable[..., Any]:
        """times: how often a ring sends a rank's share of the whole tensor, the largest argument."""

        def counting(*tensors: Any, **options: Any) -> Any:
            found = [one for one in (*tensors, *options.values()) if hasattr(one, "element_size")]
            whole = max(found, key=lambda one: one.numel())
            if whole.numel() >= LARGE:
                sent.append(times * share * whole.numel() * whole.element_size())
            return call(*tensors, **options)

        return counting

    with rank.ready(overrides) as (loop, _):
        loop.step()  # buffers are made, and ZeRO 3 learns in which order it fetches
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", counted(dist.all_reduce, 2))
            for name in ("all_gather_function", "reduce_scatter_function"):
                patch.setattr(comm.cdb, name, counted(getattr(comm.cdb, name), 1))
            loop.step()
        named = list(loop.session.engine.module.named_parameters())
        sizes = [(math.prod(full_shape(one)), one.requires_grad) for _, one in named]
        ends = sum(math.prod(full_shape(one)) for name, one in named if "embed_tokens" in name or "lm_head" in name)
    return sum(sent), sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes), ends


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product((1, 2, 3), ("none", "lora"))
    ],
)
def test_a_step_sends_what_the_formulas_say(
    stage: int, adapter: str, ranks: Callable[[int], Any], short_run: Callable[..., list[str]]
) -> None:
    spec = importlib.util.spec_from_file_location("scaling_model", MODEL)
    assert spec is not None
    assert spec.loader is not None
    model = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = model
    spec.loader.exec_module(model)
    run = short_run(stage, 2, "checkpoint.at_end=false", "engine.precision=bf16", f"adapter={adapter}")
    persist = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    (sent, trained, parameters, ends), _ = ranks(2).run(sent_in_a_step, overrides=[*run, persist])
    gathered = parameters + model.gathered_in_backward(parameters, ends, lora=adapter == "lora")
    expected = model.gradient_bytes(stage, trained, 2, FORWARDS) + model.weight_bytes(
        stage, trained, gathered, 2, FORWARDS
    )
    assert sent == pytest.approx(expected, rel=0.01)
