"""Gradients of bf16 weights are summed in fp32, over micro batches and over ranks: small ones on a large one count."""

from collections.abc import Callable
from typing import Any

import pytest

# bf16 counts in steps of 2 from 256 on, and 256 + 1 rounds to 256.
LARGE, SMALL = 256.0, 1.0


def gradient(rank: Any, overrides: list[str], of_rank: list[list[float]]) -> list[float]:
    """On every rank: what AdamW gets for the head, whose gradient in each micro batch is a given number."""
    from tunesmith.train.run.engine_check import applied_gradients

    with rank.ready(overrides) as (loop, _):
        engine = loop.session.engine
        head = engine.module.get_output_embeddings()
        # Hidden states of 1: the gradient of a sum of logits is 1 everywhere. The rest of the model gets zeros.
        head.register_forward_pre_hook(lambda module, args: (args[0] * 0 + 1,))
        for batch, number in zip(loop.run.feed.batches(0), of_rank[rank.world.rank], strict=True):
            engine.backward(number * engine.scorer.target_logits(batch)[0].float().sum())
        assert engine.step().applied
        return applied_gradients(engine)["lm_head.weight"].unique().tolist()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "of_rank",
    [
        pytest.param([[LARGE, SMALL, SMALL, SMALL], [0, 0, 0, 0]], id="micro-batches"),
        pytest.param([[LARGE, 0], [SMALL, 0]], id="ranks"),
    ],
)
def test_small_gradients_are_not_lost_on_a_large_one(
    ranks: Callable[[int], Any],
    short_run: Callable[..., list[str]],
    stage: int,
    of_rank: list[list[float]],
) -> None:
    own = ["engine.precision=bf16", f"batch.micro_batch_size={4 // len(of_rank[0])}", "kernels=off"]
    own += ["optimizer.beta1=0", "optimizer.max_grad_norm=null"]  # AdamW keeps the gradient as it is
    overrides = short_run(stage, 1, *own, splits_all=True)
    assert ranks(2).run(gradient, overrides=overrides, of_rank=of_rank) == [[sum(map(sum, of_rank))]] * 2
