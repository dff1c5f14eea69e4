"""The auxiliary loss of routers is transformers', counts tokens and not micro batches, and is said or left out."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from tunesmith.train.config.config import ModelConfig
from tunesmith.train.errors import ModelError
from tunesmith.train.model.load import load_base
from tunesmith.train.model.router_loss import find_router_loss, load_balancing_loss
from tunesmith.train.ranks.distributed import sum_over_ranks
from tunesmith.train.run.summary import start_rows

COEFFICIENT = 0.5  # large, so that its gradient outweighs rounding


@pytest.mark.parametrize("padding", [0, 5])
def test_it_is_what_transformers_computes(padding):
    logits = tuple(torch.randn(24, 8, generator=torch.Generator().manual_seed(layer)) for layer in range(3))
    mask = torch.ones(2, 12)
    mask[1, 12 - padding :] = 0
    expected = load_balancing_loss_func(logits, 8, 2, mask)
    torch.testing.assert_close(load_balancing_loss(logits, 2, mask.flatten()), expected)


def first_step(rank: Any, overrides: list[str], coefficient: float) -> dict[str, Any]:
    """On every rank: the first step, and the same by hand with transformers' own losses of each micro batch."""
    with rank.ready(overrides) as (loop, _):
        model = load_base(loop.run.config).train()
        batches = loop.run.feed.batches(0)
        counts = torch.tensor([[batch.target_weight, batch.num_tokens] for batch in batches]).sum(0)
        weight, num_tokens = sum_over_ranks(counts).tolist()
        aux = torch.zeros(())
        for batch in batches:
            outputs = model(**batch.inputs, output_router_logits=True, use_cache=False)
            is_token = torch.arange(batch.labels.shape[1]) < batch.lengths[:, None]
            mine = load_balancing_loss_func(outputs.router_logits, 4, 2, is_token) * batch.num_tokens / num_tokens
            nll = torch.nn.functional.cross_entropy(outputs.logits.mT, batch.labels, reduction="none")
            ((nll * batch.weights).sum() / weight + coefficient * mine).backward()
            aux += mine.detach()
        squares = torch.stack([sum_over_ranks(p.grad).square().sum() for p in model.parameters()])
        step = loop.step()
        assert step is not None
        return {
            "found": [step.metrics.get("router_aux_loss"), step.grad_norm, step.loss],
            "shown": dict(start_rows(loop.run, loop.session)).get("routers", ""),
            "by hand": [float(sum_over_ranks(aux)), float(squares.sum().sqrt())],
        }


@pytest.mark.parametrize(
    ("stage", "own"),
    [
        (3, ["batch.packing=none"]),
        pytest.param(0, [], marks=pytest.mark.slow),
        pytest.param(2, ["batch.packing=none", "kernels=off"], marks=pytest.mark.slow),
        pytest.param(3, ["kernels=off", "memory=recompute"], marks=pytest.mark.slow),
        pytest.param(2, ["batch.micro_batch_size=4"], marks=pytest.mark.slow),
    ],
)
def test_it_is_the_mean_over_tokens_and_learned_from(stage, own, ranks, short_run, make_experts):
    model = make_experts("qwen3_moe", output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    overrides = short_run(stage, 1, *own, model=model, splits_all=True)
    for answer in ranks(2).run(first_step, overrides=overrides, coefficient=COEFFICIENT):
        assert answer["found"][:2] == pytest.approx(answer["by hand"], rel=1e-4)
        assert f"auxiliary loss x {COEFFICIENT} is added" in answer["shown"]


def test_the_split_of_equal_records_changes_nothing(ranks, short_run, make_experts, tmp_path):
    model = make_experts("qwen3_moe")
    row = {"messages": [{"role": "user", "content": "pot leaf"}, {"role": "assistant", "content": "seed water soil"}]}
    (tmp_path / "equal.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    own = [f"data.train={tmp_path}/equal.jsonl", "batch.packing=none", f"model.router_aux_loss_coef={COEFFICIENT}"]
    found = []
    for size in (1, 4):
        overrides = short_run(2, 1, *own, f"batch.micro_batch_size={size}", model=model)
        answer = ranks(2).run(first_step, overrides=overrides, coefficient=COEFFICIENT)[0]
        found.append(answer["found"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_extra_outputs_change_nothing_and_0_leaves_it_out(ranks, short_run, make_experts):
    asked = make_experts("qwen3_moe", output_router_logits=True, output_hidden_states=True, return_dict=False)
    plain = short_run(2, 1, model=make_experts("qwen3_moe"))
    off = short_run(2, 1, "model.router_aux_loss_coef=0", model=asked)
    for without, with_ in zip(
        ranks(2).run(first_step, overrides=plain, coefficient=0.0),
        ranks(2).run(first_step, overrides=off, coefficient=0.0),
        strict=True,
    ):
        assert with_["found"] == without["found"]
        assert with_["found"][0] is None
        assert with_["shown"] == ""


def test_what_a_model_does_not_have_is_said(make_model, make_experts):
    llama = AutoModelForCausalLM.from_pretrained(make_model())
    settings = ModelConfig(name_or_path="m", router_aux_loss_coef=0.1)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no auxiliary loss") as caught:
        find_router_loss(llama, settings, pytest.fail)
    assert "model.router_aux_loss_coef" in str(caught.value)
    said: list[str] = []
    llama.config.output_router_logits = True
    assert find_router_loss(llama, ModelConfig(name_or_path="m"), said.append) is None
    assert "changes nothing" in said[0]
    mixtral = AutoModelForCausalLM.from_pretrained(make_experts("mixtral"))
    assert find_router_loss(mixtral, ModelConfig(name_or_path="m"), pytest.fail) is None  # its config does not ask
    found = find_router_loss(mixtral, settings, pytest.fail)
    assert found is not None
    assert found.coefficient == 0.1
