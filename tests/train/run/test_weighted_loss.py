"""Loss and gradient of targets that weigh 0.25 to 2, against float64 by hand, over every split."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GLOBAL_BATCH = 8
NUM_RECORDS = {"none": 20, "best_fit": 60}  # of both: whole steps, and a last one that leaves a rank with less
# world size, accumulation, packing, kernels: each two settings meet, and each meets every stage.
HALVES = [(1, 1, "none", "off"), (1, 1, "best_fit", "torch"), (1, 4, "none", "torch"), (1, 4, "best_fit", "off")]
OTHERS = [(2, 4, "best_fit", "torch"), (2, 4, "none", "off"), (2, 1, "best_fit", "off"), (2, 1, "none", "torch")]


def run(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: an epoch that leaves the weights as they are, the examples of each step, and an evaluation."""
    with rank.ready(overrides) as (loop, recorder):
        store, feed = loop.run.data.train, loop.run.feed
        places = store.places()
        steps = [
            [places.index(name) for batch in feed.names(step) for name in batch] for step in range(feed.total_steps)
        ]
        loop.train()
        return {
            "examples": [[part.tolist() for part in store.record(index)] for index in range(store.num_records)],
            "steps": steps,
            "losses": recorder.losses,
            "norms": [step.grad_norm for step in recorder.steps],
            "eval_loss": rank.evaluate(loop, batch_size=3)["eval/loss"],
        }


def by_hand(folder: Path, examples: list[list[Any]]) -> tuple[float, float]:
    """Loss of some examples and the norm of its gradient: one at a time, whole logits, all in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    loss_sum, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    for ids, weights in examples:
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        of_next = logprobs[range(len(ids) - 1), ids[1:]]
        loss_sum = loss_sum - (torch.tensor(weights[1:], dtype=torch.float64) * of_next).sum()
        weight_sum += sum(weights[1:])
    loss = loss_sum / weight_sum
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    return loss.item(), norm.item()


@pytest.mark.parametrize(
    ("stage", "split"), [(stage, split) for half in (HALVES, OTHERS) for stage, split in enumerate(half)]
)
def test_a_step_is_the_weighted_mean_of_its_targets(
    ranks: Callable[[int], Any],
    short_run: Callable[..., list[str]],
    make_model: Callable[..., Path],
    stage: int,
    split: tuple[int, int, str, str],
) -> None:
    world_size, accumulation, packing, kernels = split
    own = [f"batch.packing={packing}", f"batch.micro_batch_size={GLOBAL_BATCH // world_size // accumulation}"]
    own += [f"kernels={kernels}", "schedule.epochs=1", "optimizer.learning_rate=1e-30", "checkpoint.at_end=false"]
    overrides = short_run(stage, None, *own, records=NUM_RECORDS[packing], splits_all=True)
    found = ranks(world_size).run(run, overrides=overrides)
    examples = found[0]["examples"]
    steps = [list(itertools.chain(*parts)) for parts in zip(*(on_rank["steps"] for on_rank in found), strict=True)]
    assert sorted(itertools.chain(*steps)) == list(range(len(examples)))
    for step in steps:
        weights = [weight for index in step for weight in examples[index][1] if weight]
        assert len(set(weights)) > 2
        assert abs(sum(weights) / len(weights) - 1) > 1e-3  # or a division by their count would be the same
    expected = [by_hand(make_model(), [examples[index] for index in step]) for step in steps]
    for on_rank in found:
        assert on_rank["losses"] == pytest.approx([loss for loss, _ in expected], rel=1e-6)
        assert on_rank["norms"] == pytest.approx([norm for _, norm in expected], rel=1e-5)
        assert on_rank["eval_loss"] == pytest.approx(by_hand(make_model(), examples)[0], rel=1e-6)
