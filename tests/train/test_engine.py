"""What the engine promises on real ranks: packing, steps that are not finite, master weights, weight decay, offload."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
}

OverridesOf = Callable[..., list[str]]
Once = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def once(ranks: Callable[[int], Any]) -> Once:
    """once(function, ...) runs it on two ranks; the second time it is asked for the same, it has the answer."""
    known: dict[str, list[Any]] = {}

    def run(function: Callable[..., Any], **arguments: Any) -> list[Any]:
        key = f"{function.__name__} {arguments}"
        if key not in known:
            known[key] = ranks(2).run(function, **arguments)
        return known[key]

    return run


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]]) -> OverridesOf:
    """Overrides of a small fp32 run of a stage, of a llama unless told otherwise."""
    return lambda stage, *more, model=None: short_run(stage, 6, "checkpoint.at_end=false", *more, model=model)


def packed_against_alone(rank: Any, overrides: list[str]) -> dict[str, float]:
    """On a rank: how far the logits of packed sequences are from those of their records one by one."""
    import torch

    with rank.ready(overrides) as (loop, _), torch.no_grad():
        engine, store = loop.session.engine, loop.run.data.train
        engine.eval()
        together = engine.scorer.target_logits(store.batch(range(4), pad_token_id=0))
        alone = []
        for record in range(int(store.sequences[4])):
            ids, weights = (torch.from_numpy(part.copy()) for part in store.record(record))
            logits = engine.module(input_ids=ids[None].long(), use_cache=False).logits[0]
            alone.append(logits[:-1][weights[1:] != 0])
        return {
            "difference": float((together - torch.cat(alone)).abs().max()),
            "largest_logit": float(together.abs().max()),
            "num_records": len(alone),
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_record_has_the_logits_it_has_alone(
    ranks: Callable[[int], Any], make_model: Callable[..., Path], overrides_of: OverridesOf, family: str
) -> None:
    model = make_model(family, **FAMILIES[family])
    (found,) = ranks(1).run(packed_against_alone, overrides=overrides_of(0, model=model))
    assert found["num_records"] > 8
    assert found["largest_logit"] > 1
    assert found["difference"] < 1e-5


def refusal(rank: Any, overrides: list[str]) -> list[str]:
    """On a rank: what is said of the live model of an unpacked run when it is asked whether it could pack."""
    from tunesmith.train.config.config import Packing
    from tunesmith.train.errors import TunesmithError
    from tunesmith.train.run.packing_check import check_packing

    with rank.ready([*overrides, "batch.packing=none"]) as (loop, _):
        said = []
        for packing in (Packing.best_fit, Packing.none):  # none: an example of several parts shares a sequence
            loop.run.config.batch.packing = packing
            try:
                check_packing(loop.session.engine, loop.run.config, evaluates=False)
            except TunesmithError as error:
                said.append(str(error))
        return said


@pytest.mark.parametrize("setting", ["engine.precision=fp32", "engine.precision=bf16", "adapter=lora"])
def test_a_live_model_whose_mask_leaves_position_ids_out_is_noticed(
    ranks: Callable[[int], Any], make_model: Callable[..., Path], overrides_of: OverridesOf, setting: str
) -> None:
    """Behind the twin of its config, which has been asked before (tests/train/model/test_packing.py)."""
    model = make_model("gpt_oss", **GPT_OSS)
    ((packed, unpacked),) = ranks(1).run(
        refusal, overrides=overrides_of(0, setting, "model.attention=eager", model=model)
    )
    assert packed.startswith(f"ModelError: {model} with eager attention lets packed records see each other")
    assert "do: set batch.packing=none" in packed
    assert "at: model.attention" in unpacked


def moved_by_a_stranger(rank: Any, overrides: list[str]) -> list[float]:
    """On a rank: how far the logits of a sequence's first and second record move when the first one changes."""
    import torch

    from tunesmith.train.model.attention import offering

    with rank.ready(overrides) as (loop, _), torch.no_grad():
        engine, store = loop.session.engine, loop.run.data.train
        engine.eval()
        batch = store.batch([0], pad_token_id=0)
        first, second = (int(end) for end in store.record_starts[1:3] - store.record_starts[0])
        with offering(batch.segments):
            before = engine.module(**batch.inputs, use_cache=False).logits[0]
            batch.inputs["input_ids"][0, 1] += 1
            after = engine.module(**batch.inputs, use_cache=False).logits[0]
        moved = (after - before).abs().amax(-1)
        return [float(moved[:first].max()), float(moved[first:second].max())]


def test_a_change_in_one_packed_record_does_not_move_another(
    ranks: Callable[[int], Any], overrides_of: OverridesOf
) -> None:
    ((own, other),) = ranks(1).run(moved_by_a_stranger, overrides=overrides_of(0))
    assert own > 0.1
    assert other == 0.0


def evaluation(rank: Any, overrides: list[str], batch_size: int) -> dict[str, float]:
    with rank.ready(overrides) as (loop, _):
        return rank.evaluate(loop, batch_size)


@pytest.mark.parametrize(("world_size", "batch_size"), covered(itertools.product((1, 2), (1, 3, 8)), [(1, 8), (2, 3)]))
def test_packed_and_unpacked_have_the_same_eval_loss(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, world_size: int, batch_size: int
) -> None:
    packed, unpacked = (
        ranks(world_size).run(evaluation, overrides=overrides_of(0, f"batch.packing={packing}"), batch_size=batch_size)
        for packing in ("best_fit", "none")
    )
    assert packed[0] == packed[-1]
    assert packed[0]["eval/loss"] == pytest.approx(unpacked[0]["eval/loss"], abs=1e-5)
    assert packed[0]["eval/token_accuracy"] == unpacked[0]["eval/token_accuracy"]


# ---------------------------------------------------------------- steps that are not finite


def poisoned_run(rank: Any, overrides: list[str], poison: str, step: int) -> dict[str, Any]:
    """On every rank: a run in which the loss of the last rank's first micro batch of a step is not finite.

    poison: "nan" or "inf", the weight of a label; "loss": a logit of minus infinity, which makes the loss infinite
    while its gradient stays finite; "absent": the step is passed over, which is what skipping it must come to.
    """
    import math
    from dataclasses import replace

    import torch

    with rank.ready(overrides) as (loop, recorder):
        doomed: list[torch.Tensor] = []

        def infinite(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
            if not doomed:
                return logits
            holes = torch.zeros_like(logits)
            holes[0].scatter_(1, doomed.pop()[:, None], -math.inf)
            return logits + holes

        loop.session.engine.module.get_output_embeddings().register_forward_hook(infinite)

        class PoisonedFeed:
            def __getattr__(self, name: str) -> Any:
                return getattr(feed, name)

            def batches(self, at: int) -> Any:
                batches = feed.batches(at)
                if at != step or rank.world.rank != rank.world.world_size - 1:
                    return batches
                first = batches[0]
                if poison == "loss":
                    doomed.append(first.labels.flatten()[first.target_rows])
                    return batches
                weights = first.weights.clone()
                weights.view(-1)[first.target_rows[0]] = float(poison)
                return [replace(first, columns={"weights": weights}), *batches[1:]]

        feed = loop.run.feed
        loop.run = replace(loop.run, feed=PoisonedFeed())
        digests = []
        while loop.session.state.step < loop.run.feed.total_steps:
            if poison == "absent" and loop.session.state.step == step:
                loop.session.state.step += 1
            else:
                loop.step()
            digests.append(weights_digest(loop.session.engine))
        return {
            "losses": recorder.losses,
            "applied": [it.applied for it in recorder.steps],
            "digests": digests,
            "warnings": recorder.warnings,
            "skipped": loop.session.state.skipped_steps,
            "in_row": loop.session.state.skipped_in_row,
        }


def weights_digest(engine: Any) -> str:
    import hashlib

    names = {name for name, _ in engine.module.named_parameters()}
    whole = [parameter.detach().float().numpy().tobytes() for _, parameter in engine.whole_parameters(names)]
    return hashlib.sha256(b"".join(whole)).hexdigest()


@pytest.mark.parametrize(
    ("stage", "precision", "poison"),
    covered(
        itertools.product(range(4), ("fp32", "bf16"), ("nan", "inf", "loss")),
        [(0, "fp32", "nan"), (1, "bf16", "loss")],
    ),
)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_counted_and_told(
    once: Once, overrides_of: OverridesOf, stage: int, precision: str, poison: str
) -> None:
    kernels = "off" if poison == "loss" else "torch"  # an infinite loss is planted in whole logits
    overrides = overrides_of(stage, f"engine.precision={precision}", f"kernels={kernels}")
    found, *others = once(poisoned_run, overrides=overrides, poison=poison, step=2)
    (without, *_) = once(poisoned_run, overrides=overrides, poison="absent", step=2)
    assert found["applied"] == [True, True, False, True, True, True]
    assert [other["applied"] for other in others] == [found["applied"]]
    assert not -1e9 < found["losses"][2] < 1e9
    assert found["digests"][2] == found["digests"][1]
    assert found["digests"][3] != found["digests"][2]
    assert found["losses"][3:] == without["losses"][2:]  # moments and step count of Adam did not move either
    assert found["digests"] == without["digests"]
    assert (found["skipped"], found["in_row"]) == (1, 0)
    (warning,) = found["warnings"]
    assert warning.startswith("step 3: loss ")
    assert "not finite, so the weights were left as they are (1 in a row)" in warning


def hopeless_run(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: a run whose gradients stop being finite after two steps."""
    import torch

    from tunesmith.train.errors import TrainingError

    with rank.ready(overrides) as (loop, recorder):
        scale = {"hidden": 1.0}
        head = loop.session.engine.module.get_output_embeddings()
        head.register_forward_pre_hook(lambda module, args: (args[0] * scale["hidden"],))
        loop.step()
        loop.step()
        scale["hidden"] = torch.nan
        try:
            loop.train()
        except TrainingError as error:
            return {"error": str(error), "step": loop.session.state.step, "warnings": len(recorder.warnings)}
    return {"error": "none"}


@pytest.mark.parametrize("stage", covered([0, 3], [3]))
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, stage: int
) -> None:
    for found in ranks(2).run(hopeless_run, overrides=overrides_of(stage, "optimizer.max_skipped_steps=3")):
        assert found["error"].startswith("TrainingError: 3 steps in a row had a loss or gradient that is not finite.")
        assert "at: step 5" in found["error"]
        assert "optimizer.max_skipped_steps sets the limit" in found["error"]
        assert (found["step"], found["warnings"]) == (5, 3)


# ---------------------------------------------------------------- master weights, weight decay, offload, fp16


def trained(rank: Any, overrides: list[str], watch: str) -> dict[str, Any]:
    """On every rank: a run, then the named weights, and what its optimizer holds."""
    import torch

    with rank.ready(overrides) as (loop, recorder):
        loop.train()
        names = {name for name, _ in loop.session.engine.module.named_parameters() if watch in name}
        weights = {
            name: p.detach().float().flatten().tolist() for name, p in loop.session.engine.whole_parameters(names)
        }
        optimizer = loop.session.engine._engine.basic_optimizer
        moments = [
            value
            for state in optimizer.state.values()
            for name, value in state.items()
            if torch.is_tensor(value) and name.startswith("exp_avg")
        ]
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if loop.run.config.engine.stage == 3:  # lent to the optimizer group by group
            masters = loop.session.engine._engine.optimizer.fp32_partitioned_groups_flat
        return {
            "losses": recorder.losses,
            "norms": [step.grad_norm for step in recorder.steps],
            "applied": [step.applied for step in recorder.steps],
            "weights": weights,
            "moments": sorted({str(tensor.dtype) for tensor in moments}),
            "num_moments": len(moments),
            "masters": sorted({str(tensor.dtype) for tensor in masters}),
            "module": sorted({str(parameter.dtype) for parameter in loop.session.engine.module.parameters()}),
        }


# Accumulation 2 and 1: under ZeRO 1 DeepSpeed takes another optimizer for each.
@pytest.mark.parametrize(("stage", "micro"), covered([(0, 2), (1, 2), (1, 4), (2, 2), (3, 2)], [(1, 2)]))
def test_bf16_keeps_updates_that_are_too_small_for_bf16(
    once: Once, overrides_of: OverridesOf, stage: int, micro: int
) -> None:
    """A norm weight near 1 moves by 6e-4 a step; bf16 counts in steps of 4e-3 there, so alone it would never move."""
    few = ["optimizer.learning_rate=6e-4", "schedule.max_steps=12"]
    bf16 = ["engine.precision=bf16", f"batch.micro_batch_size={micro}"]
    found = once(trained, overrides=overrides_of(stage, *few, *bf16), watch="model.norm")[0]
    exact = once(trained, overrides=overrides_of(0, *few), watch="model.norm")[0]
    start = once(trained, overrides=overrides_of(0, "optimizer.learning_rate=1e-30"), watch="model.norm")[0]
    ((name, weights),) = found["weights"].items()
    moved = [abs(a - b) for a, b in zip(exact["weights"][name], start["weights"][name], strict=True)]
    assert max(moved) > 5e-3  # in fp32, of 12 x 6e-4 at most
    apart = [abs(a - b) for a, b in zip(weights, exact["weights"][name], strict=True)]
    assert sum(apart) / len(apart) < sum(moved) / len(moved) / 2
    assert found["moments"] == found["masters"] == ["torch.float32"]
    assert found["num_moments"] > 0
    assert found["module"] == ["torch.bfloat16"]


@pytest.mark.parametrize(
    ("stage", "family"),
    covered(itertools.product(range(4), ("qwen2", "gpt2")), [(0, "qwen2"), (3, "gpt2")]),
)
def test_only_matrices_decay(
    once: Once, make_model: Callable[..., Path], overrides_of: OverridesOf, stage: int, family: str
) -> None:
    """One step whose gradient moves a weight by 1e-6 and whose decay takes a tenth of it."""
    model = make_model(family, **FAMILIES[family], tie_word_embeddings=family == "gpt2")
    decay = ["optimizer.learning_rate=1e-6", "optimizer.weight_decay=1e5", "schedule.max_steps=1"]
    after = once(trained, overrides=overrides_of(stage, *decay, model=model), watch="")[0]["weights"]
    before = whole_weights(model)
    assert after.keys() == before.keys()
    kept = set()
    for name, weights in before.items():
        found = [abs(a - b) for a, b in zip(after[name], weights, strict=True)]
        decayed = [abs(a - 0.9 * b) for a, b in zip(after[name], weights, strict=True)]
        assert min(max(found), max(decayed)) < 3e-6, name
        if max(found) < 3e-6:
            kept.add(name)
    embeddings = {"qwen2": {"model.embed_tokens.weight"}, "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"}}
    flat = {name for name in before if "norm" in name or ".ln_" in name or name.endswith("bias")}
    assert kept == flat | embeddings[family]
    assert len(flat) > 8
    assert ("lm_head.weight" in before) == (family == "qwen2")  # an untied head is a matrix, a tied one an embedding


def whole_weights(folder: Path) -> dict[str, list[float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: parameter.detach().float().flatten().tolist() for name, parameter in model.named_parameters()}


@pytest.mark.slow  # DeepSpeed's CPU Adam is compiled first: a minute and a half
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["zero2_offload", "zero3_offload"])
def test_offload_does_not_change_the_loss_curve(once: Once, overrides_of: OverridesOf, engine: str) -> None:
    offload = [f"engine={engine}", "engine.precision=fp32", "optimizer.max_grad_norm=0.5", "schedule.max_steps=12"]
    found = once(trained, overrides=overrides_of(0, *offload), watch="model.norm")[0]
    plain = once(
        trained, overrides=overrides_of(0, "optimizer.max_grad_norm=0.5", "schedule.max_steps=12"), watch="model.norm"
    )[0]
    assert found["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    assert found["moments"] == ["torch.float32"]


@pytest.mark.parametrize("stage", covered(range(4), [1]))
def test_fp16_scales_its_loss_and_learns_as_fp32_does(once: Once, overrides_of: OverridesOf, stage: int) -> None:
    few = ["schedule.max_steps=24", "optimizer.learning_rate=3e-3"]
    found = once(trained, overrides=overrides_of(stage, *few, "engine.precision=fp16"), watch="model.norm")[0]
    exact = once(trained, overrides=overrides_of(0, *few), watch="model.norm")[0]
    assert found["applied"] == [True] * 24
    assert found["losses"] == pytest.approx(exact["losses"], abs=5e-3)
    assert found["norms"] == pytest.approx(exact["norms"], rel=2e-2)
    assert found["masters"] == ["torch.float32"]
    assert found["module"] == ["torch.float16"]


@pytest.mark.parametrize("stage", covered(range(4), [2]))
def test_fp16_skips_steps_until_its_loss_scale_fits(once: Once, overrides_of: OverridesOf, stage: int) -> None:
    high = ["engine.precision=fp16", "engine.deepspeed.fp16.initial_scale_power=20", "optimizer.max_skipped_steps=12"]
    found = once(trained, overrides=overrides_of(stage, *high, "schedule.max_steps=24"), watch="model.norm")
    assert found[0]["applied"][:2] == [False, False]
    assert found[0]["applied"][-3:] == [True, True, True]
    assert found[0]["applied"] == found[1]["applied"]
