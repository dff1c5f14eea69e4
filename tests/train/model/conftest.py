"""Tiny mixtures of experts, as they are published: Qwen3-MoE and Mixtral with a tensor an expert, DeepSeek-V3 with a
dense layer and a shared expert too, Qwen2-MoE with a shared expert that has a gate, gpt-oss with a tensor for all
experts of a layer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 8,
    },
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.fixture(scope="session")
def make_experts(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """make_experts("mixtral") is the folder of a model of two layers with four experts each."""
    return lambda family, **changes: make_model(family, **(EXPERTS[family] | changes))
