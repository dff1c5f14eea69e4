"""all-linear is every matrix but embeddings, head and routers; LoRA on experts survives saving and merging."""

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tunesmith.train.config.config import AdapterConfig, AdapterKind, Kernels
from tunesmith.train.errors import ModelError
from tunesmith.train.model.adapter import adapted_lines, add_adapter
from tunesmith.train.model.load import quiet_transformers
from tunesmith.train.model.lora_layers import use_lora_kernels
from tunesmith.train.model.targets import shortest_names

IDS = torch.arange(40).reshape(2, 20) % 17
ATTENTION = [
    "self_attn.q_proj: 2 adapted, 256 parameters",
    "self_attn.k_proj: 2 adapted, 192 parameters",
    "self_attn.v_proj: 2 adapted, 192 parameters",
    "self_attn.o_proj: 2 adapted, 256 parameters",
]
WIDE = ["mlp.experts.down_proj: 8 adapted, 1,536 parameters", "mlp.experts.gate_up_proj: 8 adapted, 2,560 parameters"]
TABLES = {
    "qwen3_moe": [
        *ATTENTION,
        "mlp.experts.down_proj: 8 adapted, 768 parameters",
        "mlp.experts.gate_up_proj: 8 adapted, 1,024 parameters",
        "not adapted: embed_tokens, mlp.gate, lm_head",
    ],
    "mixtral": [*ATTENTION, *WIDE, "not adapted: embed_tokens, mlp.gate, lm_head"],
    "gpt_oss": [
        *ATTENTION,
        *WIDE,
        "not adapted: embed_tokens, mlp.router, mlp.experts.gate_up_proj_bias, mlp.experts.down_proj_bias, lm_head",
    ],
    "deepseek_v3": [
        "self_attn.q_a_proj: 2 adapted, 160 parameters",
        "self_attn.q_b_proj: 2 adapted, 224 parameters",
        "self_attn.kv_a_proj_with_mqa: 2 adapted, 176 parameters",
        "self_attn.kv_b_proj: 2 adapted, 288 parameters",
        "self_attn.o_proj: 2 adapted, 256 parameters",
        "mlp.gate_proj: 1 adapted, 192 parameters",  # the dense layer
        "mlp.up_proj: 1 adapted, 192 parameters",
        "mlp.down_proj: 1 adapted, 192 parameters",
        "mlp.experts.down_proj: 4 adapted, 384 parameters",
        "mlp.experts.gate_up_proj: 4 adapted, 512 parameters",
        "mlp.shared_experts.gate_proj: 1 adapted, 96 parameters",
        "mlp.shared_experts.up_proj: 1 adapted, 96 parameters",
        "mlp.shared_experts.down_proj: 1 adapted, 96 parameters",
        "not adapted: embed_tokens, mlp.gate, lm_head",
    ],
    "qwen2_moe": [  # a shared expert with a gate of its own, which is a router too
        *ATTENTION,
        "mlp.experts.down_proj: 8 adapted, 768 parameters",
        "mlp.experts.gate_up_proj: 8 adapted, 1,024 parameters",
        "mlp.shared_expert.gate_proj: 2 adapted, 208 parameters",
        "mlp.shared_expert.up_proj: 2 adapted, 208 parameters",
        "mlp.shared_expert.down_proj: 2 adapted, 208 parameters",
        "not adapted: embed_tokens, mlp.gate, mlp.shared_expert_gate, lm_head",
    ],
}
FOUR = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]


@pytest.fixture
def base(make_experts):
    """base("mixtral") is a tiny model as it is read from its files."""
    return lambda family, **changes: AutoModelForCausalLM.from_pretrained(make_experts(family, **changes)).eval()


def adapted(model: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 2, "alpha": 4, "kind": AdapterKind.lora} | settings
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's words reach nobody raw
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return add_adapter(model, AdapterConfig(**settings))


def moved(model: Any) -> Any:
    """Every B of LoRA away from 0, where it does nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    return model


@pytest.mark.parametrize("family", TABLES)
def test_all_linear_is_every_matrix_but_embeddings_head_and_router(family, base):
    assert adapted_lines(adapted(base(family))) == TABLES[family]


@pytest.mark.parametrize("family", FOUR)
def test_it_opens_in_peft_and_merges_with_the_same_logits(family, base, tmp_path):
    model = moved(adapted(base(family)))
    left = use_lora_kernels(model, Kernels.torch, sharded=False)
    live = model(IDS).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        opened = PeftModel.from_pretrained(base(family), tmp_path / "adapter")
    torch.testing.assert_close(opened(IDS).logits, live, rtol=1e-4, atol=1e-4)  # the sum is rounded first
    assert (live - base(family)(IDS).logits).abs().max() > 0.1
    opened.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, live, rtol=1e-4, atol=1e-4)
    assert left == []


@pytest.mark.parametrize("family", FOUR)
def test_our_forwards_have_pefts_gradients(family, base):
    def gradients(kernels: Kernels | None) -> dict[str, torch.Tensor]:
        model = moved(adapted(base(family)))
        if kernels:
            use_lora_kernels(model, kernels, sharded=False)
        model(IDS).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(None), gradients(Kernels.torch)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("setting", "remedy"), [({"dropout": 0.1}, "adapter.dropout=0"), ({"use_dora": True}, "adapter.use_dora=false")]
)
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_what_experts_cannot_have_is_refused_with_remedies_that_work(setting, remedy, family, base):
    with pytest.raises(ModelError, match="does not go with LoRA on") as caught:
        adapted(base(family), **setting)
    text = str(caught.value)
    assert remedy in text
    dense = text.partition("adapter.target_modules=[")[2].partition("]")[0].split(",")
    lines = adapted_lines(adapted(base(family), target_modules=dense, **setting))
    assert {line.partition(":")[0].rpartition(".")[-1] for line in lines[:-1]} == set(dense)


@pytest.mark.parametrize(
    ("family", "wanted", "kinds"),
    [
        ("qwen3_moe", "q_proj", {"self_attn.q_proj"}),
        ("qwen3_moe", ["experts"], {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}),
        ("gpt_oss", ["v_proj", "experts.down_proj"], {"self_attn.v_proj", "mlp.experts.down_proj"}),
        ("deepseek_v3", ["gate_proj"], {"mlp.gate_proj", "mlp.shared_experts.gate_proj"}),
        ("mixtral", ["gate"], {"mlp.gate"}),  # a router, where somebody names it
        ("mixtral", ["layers.1.self_attn.q_proj", "lm_head"], {"self_attn.q_proj", "lm_head"}),
    ],
)
def test_names_mean_what_the_model_has_by_them(family, wanted, kinds, base):
    lines = adapted_lines(adapted(base(family), target_modules=wanted))
    assert {line.partition(":")[0] for line in lines[:-1]} == kinds


def test_a_name_that_is_not_there_is_refused_with_those_that_are(base):
    with pytest.raises(ModelError, match=r"no module nope, w1 for LoRA") as caught:
        adapted(base("mixtral"), target_modules=["q_proj", "nope", "w1"])
    assert "(found: down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj)" in str(caught.value)


def test_names_are_cut_as_far_as_they_fit_no_other():
    every = ["a.0.mlp.up", "a.1.mlp.up", "a.0.head.up", "a.0.mlp.down"]
    assert shortest_names(["a.0.mlp.up", "a.1.mlp.up", "a.0.mlp.down"], every) == ["down", "mlp.up"]
    assert shortest_names(every[:1], every) == ["0.mlp.up"]
