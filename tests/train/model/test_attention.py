"""Packed records in segments have the loss and the gradients that each has alone, in transformers' own attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tunesmith.kernels.attention.segments import Segments
from tunesmith.train.model.attention import NAMES, offering, use_segments
from tunesmith.train.model.recompute import recompute_blocks

LENGTHS = [[23, 1, 40], [64], [30, 34]]  # two records are longer than a window of 16
WINDOW = {"sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**MLA, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},  # every other layer has a window, and scores a soft cap
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "qwen3_moe": EXPERTS,
    "deepseek_v3": {**DEEPSEEK, "n_group": 2, "topk_group": 2},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_DROPOUT},
}
QUICK = ("llama", "gemma2", "gpt_oss")


def opened(folder: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batch() -> tuple[dict[str, torch.Tensor], Segments]:
    ids = torch.randint(5, 1000, (3, 64), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    return {"input_ids": ids, "position_ids": positions}, Segments.of_rows(LENGTHS)


def weighed(logits: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A loss in which every logit counts."""
    return (logits.log_softmax(-1) * factors).sum()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def alone(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of each record by itself, laid out as in the batch, and the gradients of all."""
    inputs, _ = batch()
    rows, factors = [], factors_of(model)
    for row, lengths in enumerate(LENGTHS):
        records = inputs["input_ids"][row].split(lengths)
        rows.append(torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in records]))
    whole = torch.stack(rows)
    weighed(whole, factors).backward()
    return whole.detach(), gradients(model)


def together(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs, segments = batch()
    with offering(segments):
        logits = model(**inputs, use_cache=False).logits
    weighed(logits, factors_of(model)).backward()
    return logits.detach(), gradients(model)


def factors_of(model: Any) -> torch.Tensor:
    shape = (3, 64, model.get_output_embeddings().weight.shape[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) / shape[-1]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_logits_and_gradients_are_those_of_each_record_alone(family: str, make_model: Callable[..., Path]) -> None:
    model = opened(make_model(family, **FAMILIES[family]))
    right, right_gradients = alone(model)
    assert use_segments(model)
    assert model.config._attn_implementation in NAMES.values()
    for checkpointing in (False, True):  # the second time each layer is computed again in the backward
        if checkpointing:
            model.train()
            recompute_blocks(model, 1.0)
        found, found_gradients = together(model)
        assert relative(found, right) < 1e-5
        assert found_gradients.keys() == right_gradients.keys()
        for name, gradient in right_gradients.items():
            assert relative(found_gradients[name], gradient) < 1e-5 or gradient.norm() < 1e-6, name


def test_two_forwards_before_one_backward_keep_their_own_segments(make_model: Callable[..., Path]) -> None:
    """With checkpointing, layers are computed again when another batch has been offered since."""
    model = opened(make_model("llama"))
    use_segments(model)
    model.train()
    inputs, segments = batch()
    found = {}
    for checkpointing in (False, True):
        if checkpointing:
            recompute_blocks(model, 1.0)
        with offering(segments):
            first = model(**inputs, use_cache=False).logits
        with offering(Segments.of_rows([[64]] * 3)):
            second = model(input_ids=inputs["input_ids"], use_cache=False).logits
        (first.square().mean() + second.mean()).backward()
        found[checkpointing] = gradients(model)
    for name, gradient in found[False].items():
        assert torch.equal(found[True][name], gradient), name


def test_without_an_offer_the_model_computes_as_it_does_without_us(make_model: Callable[..., Path]) -> None:
    """Padded on the left and with a cache, as answers are generated; and packed by position_ids alone."""
    model = opened(make_model("gpt_oss", **FAMILIES["gpt_oss"]))
    inputs, _ = batch()
    padded = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones(3, 64, dtype=torch.int64)}
    padded["attention_mask"][0, :20] = 0
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits, model.generate(**padded, **asked)
        use_segments(model)
        after = model(**inputs, use_cache=False).logits, model.generate(**padded, **asked)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_a_layer_that_sees_more_than_its_window_gets_a_mask(make_model: Callable[..., Path]) -> None:
    """Llama 4 sees by chunks in some layers, which segments say nothing of."""
    from transformers import masking_utils

    from tunesmith.train.model.attention import _is_known

    chunks = masking_utils.chunked_causal_mask_function(16, torch.zeros(3, dtype=torch.int64))
    packed = masking_utils.packed_sequence_compatibility_function
    inputs, segments = batch()
    windows = masking_utils.sliding_window_causal_mask_function(16)
    for known, mask in ((True, masking_utils.causal_mask_function), (True, windows), (False, chunks)):
        assert _is_known(mask) is known
        assert _is_known(packed(mask, inputs["position_ids"], segments.numbers)) is known
    assert not _is_known(masking_utils.or_masks(masking_utils.causal_mask_function, windows))
    assert not _is_known(lambda b, h, i, j: i >= j)
