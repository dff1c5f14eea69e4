"""Our kernels among the rest of a run: recomputed activations, dropout, evaluation, resuming, answering afterwards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

NUM_STEPS = 8
DROPOUT = ["adapter=lora", "adapter.dropout=0.2"]
OverridesOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]], make_records: Callable[..., Path]) -> OverridesOf:
    """Overrides of a short run in float32 on our kernels, with two forwards a step."""
    own = ["kernels=torch", "batch.global_batch_size=4", "optimizer.learning_rate=3e-3", "checkpoint.every_steps=3"]
    own += [f"data.validation={make_records(5, seed=1)}", "evaluate.every_steps=1000"]
    return lambda *more: short_run(0, NUM_STEPS, *own, *more, records=29)


RUNS = [["adapter=none"], DROPOUT, ["adapter=dora", "adapter.dropout=0.2"]]


@pytest.mark.parametrize("adapter", covered(RUNS, RUNS[1:2]), ids=str)
def test_neither_recomputation_nor_evaluation_nor_resuming_changes_a_bit(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, adapter: list[str]
) -> None:
    plain = ["memory=keep", *adapter]
    busy = ["memory=recompute", "evaluate.every_steps=2", *adapter]
    (alone,) = ranks(1).train_in_pieces(overrides=overrides_of(*plain), run_dir=str(tmp_path / "alone"), stop_after=[])
    (taken_up,) = ranks(1).train_in_pieces(
        overrides=overrides_of(*busy), run_dir=str(tmp_path / "busy"), stop_after=[4, 2]
    )
    assert len(alone["evaluations"]) < len(taken_up["evaluations"])
    assert len(alone["losses"]) == NUM_STEPS
    assert taken_up["losses"] == alone["losses"]
    assert alone["losses"][-1] < alone["losses"][0] - 0.05


def answers(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """After training: tokens and logits by our LoRA, and by PEFT's own forward; and what was left on the head."""
    import torch
    from peft.tuners.lora.layer import LoraLayer

    with rank.ready(overrides) as (loop, _):
        loop.train()
        module = loop.session.engine.module.eval()
        ids = torch.tensor([[5, 9, 31, 7], [8, 77, 6, 12]])

        def answer() -> tuple[list[list[int]], torch.Tensor]:
            tokens = module.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
            with torch.inference_mode():
                return tokens.tolist(), module(input_ids=ids).logits.clone()

        layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
        ours = answer()
        num_ours = sum("forward" in vars(layer) for layer in layers)
        for layer in layers:
            vars(layer).pop("forward", None)
        theirs = answer()
        with module.disable_adapter():
            base = module(input_ids=ids).logits
        return {
            "tokens": (ours[0], theirs[0]),
            "error": float((ours[1] - theirs[1]).norm() / theirs[1].norm()),
            "learned": float((base - theirs[1]).norm() / theirs[1].norm()),
            "num_ours": num_ours,
            "head": "forward" in vars(module.get_output_embeddings()),
        }


def test_a_trained_model_answers_as_pefts_own_forward_does(
    ranks: Callable[[int], Any], overrides_of: OverridesOf
) -> None:
    (found,) = ranks(1).run(answers, overrides=overrides_of("checkpoint.at_end=false", *DROPOUT))
    assert found["tokens"][0] == found["tokens"][1]
    assert found["error"] < 1e-6
    assert found["learned"] > 1e-2
    assert found["num_ours"] == 14
    assert not found["head"]


def after_an_error(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """A forward that fails in the middle of a layer and one that fails in the loss; then the same batch again."""
    import torch

    with rank.ready(overrides) as (loop, _):
        engine, module = loop.session.engine, loop.session.engine.module
        batch = loop.run.data.train.batch([0, 1], pad_token_id=0)
        engine.eval()
        with torch.no_grad():
            before = float(engine.scorer.nll(batch).loss)

            def fail(*_: Any) -> None:
                raise OverflowError

            problems = []
            for inner in (module.get_output_embeddings(), module.get_submodule("base_model.model.model.layers.1.mlp")):
                hook = inner.register_forward_pre_hook(fail)
                for call in (engine.scorer.nll, engine.scorer.logprobs):
                    try:
                        call(batch)
                    except OverflowError:
                        problems.append("raised")
                hook.remove()
            labels = batch.labels.clone()
            labels.view(-1)[batch.target_rows[0]] = 10**6
            try:
                engine.scorer.nll(replace(batch, labels=labels))
            except ValueError as error:
                problems.append(str(error))
            return {
                "before": before,
                "after": float(engine.scorer.nll(batch).loss),
                "problems": problems,
                "head": "forward" in vars(module.get_output_embeddings()),
                "logits": list(module(input_ids=batch.inputs["input_ids"]).logits.shape),
            }


def test_an_error_in_a_forward_leaves_nothing_behind(ranks: Callable[[int], Any], overrides_of: OverridesOf) -> None:
    (found,) = ranks(1).run(after_an_error, overrides=overrides_of(*DROPOUT))
    assert found["problems"][:4] == ["raised"] * 4
    assert found["problems"][4].startswith("labels_T holds 1000000, outside 0 to ")
    assert found["after"] == found["before"]
    assert not found["head"]
    assert len(found["logits"]) == 3
    assert found["logits"][-1] > 1000
