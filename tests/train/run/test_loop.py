"""The same data gives the same losses for every split into ranks, stages and micro batches (invariants 1 and 6)."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from matrices import covered

GLOBAL_BATCH = 8
NUM_STEPS = 13
NUM_RECORDS, EPOCHS = 33, 3  # 99 sequences: 12 global batches of 8 and one of 3
WARMUP_STEPS = 3
LEARNING_RATES = {"none": 3e-3, "lora": 5e-3}
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-5
# world size, ZeRO stage, micro batch, adapter
QUICK = [
    (2, 0, 1, "lora"),
    (1, 1, 4, "lora"),
    (2, 1, 2, "none"),
    (1, 2, 2, "lora"),
    (2, 2, 4, "none"),
    (2, 3, 4, "lora"),
]
REFERENCES = [(1, 0, 1, "none"), (1, 0, 1, "lora")]
MATRIX = list(itertools.product((1, 2), (0, 1, 2, 3), (1, 2, 4), LEARNING_RATES))

Curve = dict[str, Any]
CurveOf = Callable[..., Curve]


def train(rank: Any, overrides: list[str]) -> Curve:
    """On every rank: a whole run, what it reported, and the learning rates its optimizer used."""

    used: list[float] = []
    with rank.ready(overrides) as (loop, recorder):
        optimizer = loop.session.engine._engine.basic_optimizer
        optimizer.register_step_pre_hook(lambda it, *_: used.append(it.param_groups[0]["lr"]))
        last_targets = [batch.num_target_tokens for batch in loop.run.feed.batches(loop.run.feed.total_steps - 1)]
        first_targets = [batch.num_target_tokens for batch in loop.run.feed.batches(0)]
        loop.train()
        lora_b = [
            float(parameter.norm())
            for name, parameter in loop.session.engine.whole_parameters(
                {n for n, _ in loop.session.engine.module.named_parameters()}
            )
            if "lora_B" in name
        ]
    return {
        "losses": recorder.losses,
        "norms": [step.grad_norm for step in recorder.steps],
        "learning_rates": recorder.learning_rates,
        "used_learning_rates": list(dict.fromkeys(used)),  # ZeRO 3 steps once for each of its groups
        "first_targets": first_targets,
        "last_targets": last_targets,
        "lora_b": lora_b,
    }


@pytest.fixture(scope="module")
def curve_of(ranks: Callable[[int], Any], short_run: Callable[..., list[str]]) -> CurveOf:
    """The curve of a run of the given split; a reference is run once."""
    done: dict[str, Curve] = {}

    def curve(world_size: int, stage: int, micro: int, adapter: str, *more: str) -> Curve:
        own = [f"adapter={adapter}", f"batch.micro_batch_size={micro}", "batch.packing=none", "schedule=linear"]
        own += [f"schedule.epochs={EPOCHS}", f"schedule.warmup_fraction={WARMUP_STEPS / NUM_STEPS}"]
        own += [f"optimizer.learning_rate={LEARNING_RATES[adapter]}", "optimizer.weight_decay=0.1"]
        own += [f"optimizer.max_grad_norm={MAX_GRAD_NORM}", "checkpoint.at_end=false"]
        overrides = short_run(stage, None, *own, *more, records=NUM_RECORDS, splits_all=True)
        key = f"{world_size} {overrides}"
        if key not in done:
            on_ranks = ranks(world_size).run(train, overrides=overrides)
            for name in ("losses", "norms"):
                assert on_ranks[0][name] == on_ranks[-1][name], f"ranks differ in {name}"
            done[key] = on_ranks[0] | {"last_targets": [on_rank["last_targets"] for on_rank in on_ranks]}
        return done[key]

    return curve


def assert_same_curve(curve: Curve, reference: Curve) -> None:
    assert len(curve["losses"]) >= 10
    worst = max(abs(loss - expected) for loss, expected in zip(curve["losses"], reference["losses"], strict=True))
    assert worst < TOLERANCE
    # The optimizer and the clipping both hide a gradient that is too large by a factor; its norm doesn't.
    assert curve["norms"] == pytest.approx(reference["norms"], rel=TOLERANCE)


@pytest.mark.row(22)
@pytest.mark.parametrize(
    ("world_size", "stage", "micro", "adapter"), covered([point for point in MATRIX if point not in REFERENCES], QUICK)
)
def test_the_loss_curve_does_not_depend_on_the_split(
    curve_of: CurveOf, world_size: int, stage: int, micro: int, adapter: str
) -> None:
    curve = curve_of(world_size, stage, micro, adapter)
    assert_same_curve(curve, curve_of(1, 0, 1, adapter))
    # Learning rates count optimizer steps, not forwards and not ranks.
    rises = [(step + 1) / WARMUP_STEPS for step in range(WARMUP_STEPS)]
    falls = [1 - step / (NUM_STEPS - WARMUP_STEPS) for step in range(NUM_STEPS - WARMUP_STEPS)]
    expected = [LEARNING_RATES[adapter] * factor for factor in rises + falls]
    assert curve["learning_rates"] == pytest.approx(expected, rel=1e-12)
    assert curve["used_learning_rates"] == list(dict.fromkeys(curve["learning_rates"]))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_reference_curve_learns_and_is_clipped(curve_of: CurveOf, adapter: str) -> None:
    reference = curve_of(1, 0, 1, adapter)
    assert reference["losses"][-1] < reference["losses"][0] - 0.7
    assert min(reference["norms"]) > MAX_GRAD_NORM  # every step is clipped
    assert all(norm > 0.01 for norm in reference["lora_b"])
    assert bool(reference["lora_b"]) == (adapter == "lora")


@pytest.mark.row(22)
def test_the_matrix_has_uneven_micro_batches_and_a_rank_without_targets(curve_of: CurveOf) -> None:
    curve = curve_of(2, 2, 4, "none")
    assert curve["last_targets"][0][0] > 0
    assert curve["last_targets"][1] == [0]  # three sequences are left: all of them on rank 0
    assert len(set(curve_of(1, 0, 1, "none")["first_targets"])) > 3


@pytest.mark.parametrize("adapter", ["none", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_loss_curve_of_packed_sequences_does_not_depend_on_the_split(curve_of: CurveOf, adapter: str) -> None:
    packed = ["batch.packing=best_fit", "schedule.epochs=null", "schedule.max_steps=10"]
    assert_same_curve(curve_of(2, 3, 2, adapter, *packed), curve_of(1, 0, 1, adapter, *packed))


@pytest.mark.parametrize("adapter", covered(["none", "lora"], ["none"]))
def test_gradient_checkpointing_does_not_change_the_loss_curve(curve_of: CurveOf, adapter: str) -> None:
    curve = curve_of(2, 2, 4, adapter, "memory=recompute")
    assert_same_curve(curve, curve_of(1, 0, 1, adapter))
