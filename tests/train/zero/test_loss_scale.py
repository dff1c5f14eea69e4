"""The scale of an fp16 loss on any CPU: gone from the gradient before it is clipped, halved by an overflow, doubled."""

from collections.abc import Callable
from typing import Any

import pytest
from matrices import covered

STAGES = [0, 1, 2, 3]
MAX_GRAD_NORM = 0.5
OVERFLOW_AT = 2  # counted from 0


def first_update(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: the norm that a first step reports, and the gradient that AdamW gets."""
    from tunesmith.train.run.engine_check import applied_gradients

    with rank.ready(overrides) as (loop, recorder):
        loop.step()
        gradients = applied_gradients(loop.session.engine)
        return {
            "norm": recorder.steps[0].grad_norm,
            "applied": [number for gradient in gradients.values() for number in gradient.tolist()],
        }


@pytest.mark.parametrize("stage", covered(STAGES, [3]))
def test_a_gradient_is_clipped_after_it_is_unscaled(
    ranks: Callable[[int], Any], short_run: Callable[..., list[str]], stage: int
) -> None:
    own = ["checkpoint.at_end=false", f"optimizer.max_grad_norm={MAX_GRAD_NORM}"]
    scaled = ranks(2).run(first_update, overrides=short_run(stage, 1, *own, "engine.precision=fp16"))[0]
    exact = ranks(2).run(first_update, overrides=short_run(0, 1, *own))[0]
    assert exact["norm"] > 2 * MAX_GRAD_NORM
    assert scaled["norm"] == pytest.approx(exact["norm"], rel=1e-2)
    length, exact_length = (sum(number**2 for number in run["applied"]) ** 0.5 for run in (scaled, exact))
    assert exact_length == pytest.approx(MAX_GRAD_NORM, rel=1e-5)
    assert length == pytest.approx(MAX_GRAD_NORM, rel=1e-3)
    product = sum(a * b for a, b in zip(scaled["applied"], exact["applied"], strict=True))
    assert product == pytest.approx(MAX_GRAD_NORM**2, rel=1e-3)  # of the same direction


def overflowing_run(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: a run in which the last rank's gradients, not its losses, overflow in one step."""
    import hashlib

    import torch

    with rank.ready(overrides) as (loop, recorder):
        engine, state = loop.session.engine, loop.session.state

        def overflow(module: Any, args: tuple[torch.Tensor]) -> None:
            if state.step == OVERFLOW_AT and rank.world.rank == rank.world.world_size - 1 and args[0].requires_grad:
                args[0].register_hook(lambda gradient: gradient * torch.inf)

        engine.module.get_output_embeddings().register_forward_pre_hook(overflow)
        names = {name for name, _ in engine.module.named_parameters()}
        scales, digests = [engine._engine.optimizer.loss_scale], list[str]()
        while state.step < loop.run.feed.total_steps:
            loop.step()
            scales.append(engine._engine.optimizer.loss_scale)
            weights = [parameter.detach().numpy().tobytes() for _, parameter in engine.whole_parameters(names)]
            digests.append(hashlib.sha256(b"".join(weights)).hexdigest())
        applied = [step.applied for step in recorder.steps]
        return {"scales": scales, "digests": digests, "applied": applied, "losses": recorder.losses}


@pytest.mark.parametrize("stage", covered(STAGES, [1]))
def test_an_overflow_on_one_rank_skips_the_step_and_halves_the_scale_which_then_grows_again(
    ranks: Callable[[int], Any], short_run: Callable[..., list[str]], stage: int
) -> None:
    scaling = {
        "initial_scale_power": 12,
        "loss_scale_window": 2,
        "hysteresis": 1,
    }  # doubles where two good steps came before
    own = [f"engine.deepspeed.fp16.{name}={value}" for name, value in scaling.items()]
    overrides = short_run(stage, 6, "engine.precision=fp16", "checkpoint.at_end=false", *own)
    for found in ranks(2).run(overflowing_run, overrides=overrides):
        assert found["applied"] == [step != OVERFLOW_AT for step in range(6)]
        assert found["scales"] == [2.0**power for power in (12, 12, 12, 11, 11, 11, 12)]
        assert len(set(found["digests"])) == 5
        assert found["digests"][OVERFLOW_AT] == found["digests"][OVERFLOW_AT - 1]
        assert max(found["losses"]) < 20  # as they are, not scaled
