"""An objective of one file and one yaml (hinge.py) trains, evaluates and resumes like the one that ships."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

CONF = Path(__file__).parent / "conf"
NUM_STEPS = 6
OverridesOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]]) -> OverridesOf:
    own = ["objective=hinge", "batch.global_batch_size=4", "batch.micro_batch_size=1", "batch.sequence_length=160"]
    own += ["data.validation_fraction=0.2", "optimizer.learning_rate=1e-2", "checkpoint.every_steps=2"]
    own += ["evaluate.metric=eval/accuracy", "evaluate.every_steps=3"]
    return lambda stage, *more: short_run(stage, NUM_STEPS, *own, *more, records=37)


def train(rank: Any, overrides: list[str], run_dir: str, stop_after: list[int]) -> Any:
    """On every rank: a run in pieces, and its last evaluation."""
    import hinge  # noqa: F401 - it registers itself

    return rank.train_in_pieces(overrides, run_dir, stop_after, config_dir=CONF)


POINTS = [(stage, adapter) for stage in range(4) for adapter in ("none", "lora")]


@pytest.mark.parametrize(("stage", "adapter"), covered(POINTS, [(1, "lora")]))
def test_it_learns_evaluates_and_resumes_bitwise_as_on_one_rank(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, stage: int, adapter: str
) -> None:
    reference = ["objective.settings.reference=true"] if adapter == "lora" else []
    overrides = overrides_of(stage, f"adapter={adapter}", *reference)
    whole = ranks(2).run(train, overrides=overrides, run_dir=str(tmp_path / "whole"), stop_after=[])
    pieces = ranks(2).run(train, overrides=overrides, run_dir=str(tmp_path / "pieces"), stop_after=[3])
    alone = ranks(1).run(train, overrides=overrides, run_dir=str(tmp_path / "alone"), stop_after=[])
    assert whole[0] == whole[1]
    assert pieces[0]["losses"] == whole[0]["losses"]  # stopped after step 3, and resumed from the checkpoint of step 2
    assert pieces[0]["started_at"] == [0, 2]
    assert whole[0]["losses"] == pytest.approx(alone[0]["losses"], abs=2e-4)  # sums of log-probabilities, of about 200
    assert whole[0]["losses"][-1] < whole[0]["losses"][0] - 0.5
    assert whole[0]["step_metrics"][0].keys() == {"hinge", "accuracy"}
    assert whole[0]["step_metrics"][0]["hinge"] == pytest.approx(whole[0]["losses"][0], rel=1e-6)
    (first, last) = whole[0]["evaluations"]
    assert first.keys() == {"eval/hinge", "eval/accuracy"}
    assert last["eval/hinge"] == pytest.approx(alone[0]["evaluations"][1]["eval/hinge"], abs=2e-4)


def log_probabilities(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: log-probabilities of a batch, and their gradient through the input of the head."""
    import hinge  # noqa: F401
    import torch

    with rank.ready(overrides, config_dir=CONF) as (loop, _):
        engine, batch = loop.session.engine, loop.run.feed.batches(0)[0]
        head = engine.module.get_output_embeddings()
        gradients: list[torch.Tensor] = []

        def watch(module: Any, args: tuple[torch.Tensor]) -> None:
            args[0].register_hook(gradients.append)

        hook = head.register_forward_pre_hook(watch)
        logprobs = engine.scorer.logprobs(batch)
        engine.backward((logprobs * torch.linspace(-1, 2, len(logprobs))).sum())
        hook.remove()
        with torch.no_grad():
            alone = engine.scorer.logprobs(batch)
        with engine.scorer.reference():
            before = engine.scorer.logprobs(batch)
        rows = gradients[0].flatten(0, 1)
        rows = rows if len(rows) == len(logprobs) else rows[batch.target_rows]
        return {
            "in_head": engine.scorer.is_in_head,
            "logprobs": logprobs.tolist(),
            "alone": alone.tolist(),
            "before": before.tolist(),
            "gradient": rows.tolist(),
        }


@pytest.mark.parametrize("stage", covered([0, 3], [3]))
def test_log_probabilities_in_the_head_are_those_of_whole_logits(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, stage: int
) -> None:
    overrides = overrides_of(stage, "adapter=lora")
    whole = ranks(2).run(log_probabilities, overrides=[*overrides, "kernels=off"])
    in_head = ranks(2).run(log_probabilities, overrides=[*overrides, "kernels=torch"])
    for found, expected in zip(in_head, whole, strict=True):
        assert (found["in_head"], expected["in_head"]) == (True, False)
        for name in ("logprobs", "alone", "before"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5)
        assert found["before"] == pytest.approx(found["logprobs"], abs=1e-6)  # lora_B starts at 0
        for row, expected_row in zip(found["gradient"], expected["gradient"], strict=True):
            assert row == pytest.approx(expected_row, abs=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.kind=hing", "there is no objective 'hing'. Did you mean hinge?"),
        ("objective.settings.margn=2", "objective.kind=hinge has no setting 'margn'. Did you mean margin?"),
        ("objective.settings.margin=wide", "Value 'wide' of type 'str' could not be converted to Float."),
        ("evaluate.metric=eval/loss", "objective.kind=hinge has no figure 'eval/loss'."),
    ],
)
def test_what_does_not_fit_it_is_one_error(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, override: str, message: str
) -> None:
    assert ranks(1).run(refused, overrides=overrides_of(0, override))[0].startswith(f"ConfigError: {message}")


def refused(rank: Any, overrides: list[str]) -> str:
    import hinge  # noqa: F401

    from tunesmith.train.config.compose import compose_config
    from tunesmith.train.errors import ConfigError
    from tunesmith.train.objective.objective import make_objective

    try:
        make_objective(compose_config(overrides, CONF).config, None)
    except ConfigError as error:
        return str(error)
    return ""


def without_an_adapter(rank: Any, overrides: list[str]) -> str:
    import hinge  # noqa: F401

    from tunesmith.train.errors import TrainingError

    with rank.ready(overrides, config_dir=CONF) as (loop, _):
        try:
            loop.step()
        except TrainingError as error:
            return str(error)
    return ""


def test_full_fine_tuning_has_no_reference(ranks: Callable[[int], Any], overrides_of: OverridesOf) -> None:
    overrides = overrides_of(0, "objective.settings.reference=true")
    assert "only a model with an adapter" in ranks(1).run(without_an_adapter, overrides=overrides)[0]
