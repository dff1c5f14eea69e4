"""Norms, rotations and gated MLPs of real models on our kernels: the same numbers, fewer bytes kept, and what is no
formula of ours left alone.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from matrices import covered
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.kernels.dry_launches import dry_launches
from tunesmith.train.config.config import Kernels
from tunesmith.train.model.block_kernels import use_block_kernels
from tunesmith.train.model.load import quiet_transformers

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # of the training; the models here stay on the CPU
IDS = torch.tensor([[5, 9, 200, 31, 7, 8, 1000, 3], [77, 6, 6, 12, 90, 2000, 14, 15]])
NORMS, MLPS, ROTATIONS = "RMSNorm", "MLP", "Attention"
# Settings, and how many of the modules of two layers run on our kernels.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({}, {NORMS: 5, MLPS: 2, ROTATIONS: 2}),
    "qwen2": ({}, {NORMS: 5, MLPS: 2, ROTATIONS: 2}),
    "qwen3": ({}, {NORMS: 9, MLPS: 2, ROTATIONS: 2}),
    "mistral": ({"sliding_window": 16}, {NORMS: 5, MLPS: 2, ROTATIONS: 2}),
    "phi3": ({}, {NORMS: 5, MLPS: 2, ROTATIONS: 2}),  # one projection for gate and up
    "gemma2": ({"query_pre_attn_scalar": 8}, {NORMS: 9, MLPS: 2, ROTATIONS: 2}),
    "gemma3_text": ({"query_pre_attn_scalar": 8}, {NORMS: 13, MLPS: 2, ROTATIONS: 2}),
    "olmo2": ({}, {NORMS: 9, MLPS: 2, ROTATIONS: 2}),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2}, {NORMS: 9, ROTATIONS: 2}),  # experts stay
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, {NORMS: 5}),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, {}),
}

Model = Callable[..., Any]


@pytest.fixture(scope="module")
def model_of(make_model: Callable[..., Path]) -> Model:
    """model_of("gemma2", torch.bfloat16) is a fresh model in evaluation, so that nothing is dropped."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        from transformers import AutoModelForCausalLM

        settings = FAMILIES[family][0] | settings if family in FAMILIES else settings
        return AutoModelForCausalLM.from_pretrained(make_model(family, **settings), dtype=dtype).eval()

    return make


def on_our_kernels(model: Any, device: torch.device = GPU) -> Any:
    """A copy on our kernels, in plain torch; what was left alone is not said."""
    ours = copy.deepcopy(model)
    use_block_kernels(ours, Kernels.torch, device)
    return ours


def replaced(model: Any) -> dict[str, int]:
    """How many modules of each kind have our forward."""
    names = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    return dict(Counter(kind for kind in (NORMS, MLPS, ROTATIONS) for name in names if name.endswith(kind)))


def step(model: Any) -> dict[str, torch.Tensor]:
    """Logits and the gradients of a loss."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    (-logits.log_softmax(-1)[..., 3].sum() / 7).backward()
    gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def worst(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest relative norm of an error."""
    assert found.keys() == right.keys()
    return max(((found[name] - value).norm() / (value.norm() or 1)).item() for name, value in right.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_each_family_are_its_own(family: str, model_of: Model) -> None:
    theirs = model_of(family)
    ours = on_our_kernels(theirs)
    assert replaced(ours) == FAMILIES[family][1]
    found = step(ours)
    assert worst(found, step(theirs)) < 1e-5
    assert worst(step(ours), found) == 0  # and again, bit for bit


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])  # the three orders of rounding in a norm
def test_in_16_bits_the_norms_round_as_the_model_does(family: str, model_of: Model) -> None:
    theirs = model_of(family, torch.bfloat16)
    ours = on_our_kernels(theirs)
    assert replaced(ours) == FAMILIES[family][1]
    pairs = zip(theirs.modules(), ours.modules(), strict=True)
    norms = [pair for pair in pairs if type(pair[0]).__name__.endswith(NORMS)]
    lots = torch.Generator().manual_seed(0)
    for one, other in norms:
        x = torch.randn(64, len(one.weight), generator=lots).bfloat16()
        assert float((one(x) == other(x)).float().mean()) > 0.99
    assert worst(step(ours), step(theirs)) < 0.1  # of two layers in bf16


def test_on_a_cpu_what_would_be_slower_stays_transformers_own(model_of: Model) -> None:
    theirs = model_of()
    ours = on_our_kernels(theirs, CPU)
    assert replaced(ours) == {NORMS: 5, ROTATIONS: 2}
    for rows, nodes in ((4, "MulBackward0"), (2**16 // 32, "RmsNormBackward")):
        x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = ours.model.norm(x)
        assert type(y.grad_fn).__name__ == nodes
        assert torch.allclose(y, theirs.model.norm(x), rtol=0, atol=1e-5)


def test_off_and_a_second_call_change_nothing(model_of: Model) -> None:
    model = model_of()
    assert use_block_kernels(model, Kernels.off, GPU) == []
    assert replaced(model) == {}
    state = torch.get_rng_state()
    assert use_block_kernels(model, Kernels.torch, GPU) == []
    assert torch.equal(torch.get_rng_state(), state)  # asking draws no number of the run's
    before = [vars(module).get("forward") for module in model.modules()]
    assert use_block_kernels(model, Kernels.torch, GPU) == []
    assert [vars(module).get("forward") for module in model.modules()] == before


# ---------------------------------------------------------------- what is no formula of ours


def said_of(model: Any) -> list[str]:
    return [note.replace(": transformers' own forward, not our kernels", "") for note in _notes(model)]


def _notes(model: Any) -> list[str]:
    return use_block_kernels(model, Kernels.torch, GPU)


@pytest.mark.parametrize(
    ("family", "settings", "note"),
    [
        ("phi", {}, "2 x PhiAttention: it rotates a part of its 8 features"),
        ("cohere", {}, "2 x CohereAttention: its apply_rotary_pos_emb is no rotation that they know"),  # interleaved
        ("seed_oss", {}, "2 x SeedOssMLP: it is no activation(gate) * up that they know"),  # it drops
        ("llama", {"hidden_act": "relu"}, "2 x LlamaMLP: it is no activation(gate) * up that they know"),
    ],
)
def test_what_computes_something_else_is_left_alone_and_said(
    family: str, settings: dict[str, Any], note: str, model_of: Model
) -> None:
    theirs = model_of(family, **settings)
    ours = copy.deepcopy(theirs)
    assert note in said_of(ours)
    assert worst(step(ours), step(theirs)) < 1e-5


class Odd(nn.Module):
    """Looks like an RMSNorm; how is what its forward does."""

    def __init__(self, how: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.eps, self.how = 1e-5, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(x, self.weight, self.eps)


ODD_NORMS: dict[str, Callable[..., torch.Tensor]] = {
    "eps outside": lambda x, w, eps: w * x / (x.square().mean(-1, keepdim=True).sqrt() + eps),
    "a sum for the mean": lambda x, w, eps: w * x * (x.square().sum(-1, keepdim=True) + eps).rsqrt(),
    "centred": lambda x, w, eps: w * (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + eps).rsqrt(),
    "no gradient through the factor": lambda x, w, eps: (
        w * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()
    ),
    "it raises": lambda x, w, eps: x @ w,
}


@pytest.mark.parametrize("how", ODD_NORMS)
def test_a_module_that_only_looks_like_a_norm_keeps_its_forward(how: str) -> None:
    assert said_of(nn.Sequential(Odd(ODD_NORMS[how]))) == ["1 x Odd: it is no RMSNorm that they know"]


def test_hooks_on_an_activation_and_a_forward_of_its_own_stay(model_of: Model) -> None:
    model = model_of()
    first, second = (layer.mlp for layer in model.model.layers)
    seen: list[Any] = []
    first.act_fn.register_forward_hook(lambda *_: seen.append(1))
    second.forward = own = second.forward
    assert said_of(model) == ["1 x LlamaMLP: hooks on its activation would not run"]
    assert second.forward is own
    model(input_ids=IDS)
    assert seen


def test_autocast_and_other_dtypes_go_through_the_models_own_forward(model_of: Model) -> None:
    theirs = model_of()
    ours = on_our_kernels(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    assert torch.equal(ours.model.norm(x), theirs.model.norm(x))


# ---------------------------------------------------------------- what is kept


VIEWS_AND_MEMORY = {
    "alias", "as_strided", "detach", "empty", "empty_like", "new_empty", "new_empty_strided", "select", "slice",
    "split", "t", "transpose", "unsqueeze", "view", "_unsafe_view", "chunk", "reshape", "permute", "expand",
}  # fmt: skip


class Work(TorchDispatchMode):
    """Counts torch's operations that would launch something on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS_AND_MEMORY
        return func(*args, **(kwargs or {}))


class NoAttention(torch.autograd.Function):
    """Launches and keeps nothing, so that only the rest of a block is counted."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        ctx.shapes = [tensor.shape for tensor in (q, k, v)]
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        return tuple(dy.new_empty(B, T, H, K).transpose(1, 2) for B, H, T, K in ctx.shapes)


B, T, D, F, HEADS, HEAD_SIZE = 2, 4096, 4096, 14_336, 32, 128  # Llama-3.1-8B's block


def block_on_a_gpu(kernels: Kernels) -> tuple[int, int]:
    """Launches of forward and backward, and bytes kept, of one block in bf16 with frozen weights, on meta tensors."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register("none_at_all", lambda module, q, k, v, mask, **_: (NoAttention.apply(q, k, v), None))
    sizes = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": HEADS, "num_key_value_heads": 8}
    config = AutoConfig.for_model("llama", num_hidden_layers=1, vocab_size=64, pad_token_id=0, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="none_at_all")
        x = torch.empty(B, T, D, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(2, 1, T, HEAD_SIZE, dtype=torch.bfloat16).unbind(0)
    assert use_block_kernels(model.requires_grad_(False), kernels, GPU) == []
    found: dict[int, Any] = {}

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return tensor

    with dry_launches(90) as launches, Work() as work, saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model.layers[0](x, position_embeddings=angles)
        output.backward(torch.empty_like(output))
    return work.count + len(launches), sum(storage.nbytes() for storage in found.values())


def test_a_block_on_a_gpu_keeps_what_its_formulas_need_and_launches_a_third() -> None:
    """Of a norm x and a number a row, of the MLP gate and up, of the rotation the angles."""
    launches, kept = block_on_a_gpu(Kernels.triton)
    assert kept == B * T * (2 * (2 * D + 4) + 2 * 2 * F) + 2 * 2 * T * HEAD_SIZE
    their_launches, their_kept = block_on_a_gpu(Kernels.off)
    assert launches == 29  # 14 products, 8 of our kernels, 7 sums of gradients and residuals
    assert their_launches > 3 * launches
    assert kept < 0.65 * their_kept


# ---------------------------------------------------------------- with everything else


def test_lora_checkpointing_copies_and_saving_go_on_as_before(model_of: Model, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tunesmith.train.model.lora_layers import use_lora_kernels

    plain = model_of()
    torch.manual_seed(0)
    with quiet_transformers():
        theirs = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    ours = copy.deepcopy(theirs)
    use_lora_kernels(ours, Kernels.torch, sharded=False)
    ours = on_our_kernels(ours)
    assert replaced(ours) == FAMILIES["llama"][1]
    right = step(theirs)
    assert worst(step(ours), right) < 1e-5
    with quiet_transformers(), warnings.catch_warnings(action="ignore"):  # earlier releases have only this name
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert worst(step(ours.train()), right) < 1e-5
    with ours.disable_adapter(), theirs.disable_adapter():
        off = [model.eval()(input_ids=IDS).logits for model in (ours, theirs)]
    assert torch.allclose(*off, rtol=0, atol=1e-4)
    zeroed = copy.deepcopy(ours)
    for parameter in zeroed.parameters():
        parameter.data.zero_()
    assert zeroed(input_ids=IDS).logits.abs().max() == 0  # a copy computes with its own weights
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.merge_and_unload().save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(opened(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-4)
    answers = [model.generate(IDS[:1], max_new_tokens=5, do_sample=False) for model in (on_our_kernels(opened), opened)]
    assert torch.equal(*answers)


def curve(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: losses, what is on our kernels, and warnings. Everything is ours, whatever it costs on a CPU."""
    everything = patch.multiple("tunesmith.train.model.block_kernels", CPU_LEAST_ELEMENTS=0, GLU_ON_CPU=True)
    with everything, rank.ready(overrides) as (loop, recorder):
        loop.train()
        ours = replaced(loop.session.engine.module)
        return {"losses": recorder.losses, "ours": ours, "warnings": recorder.warnings}


@pytest.mark.parametrize(
    ("stage", "family", "adapter", "memory"),
    covered(
        [
            (0, "gemma2", "none", "recompute"),
            (1, "qwen3", "none", "keep"),
            (2, "phi3", "lora", "recompute"),
            (3, "gemma2", "none", "recompute"),
            (3, "qwen3", "lora", "recompute"),
        ],
        [(3, "gemma2", "none", "recompute")],
    ),
)
def test_the_loss_curve_is_the_same_at_every_stage(
    ranks: Callable[[int], Any],
    short_run: Callable[..., list[str]],
    make_model: Callable[..., Path],
    stage: int,
    family: str,
    adapter: str,
    memory: str,
) -> None:
    own = [f"memory={memory}", f"adapter={adapter}", "checkpoint.at_end=false"]
    own += ["batch.global_batch_size=4", "batch.micro_batch_size=1", "optimizer.learning_rate=1e-2"]
    settings, counts = FAMILIES[family]
    common = short_run(stage, 3, *own, records=13, splits_all=True, model=make_model(family, **settings))
    expected = ranks(2).run(curve, overrides=[*common, "kernels=off"])
    found = ranks(2).run(curve, overrides=[*common, "kernels=torch"])
    for ours, theirs in zip(found, expected, strict=True):
        assert (theirs["ours"], ours["ours"]) == ({}, counts)
        assert ours["warnings"] == []
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0, abs=2e-5)
        assert ours["losses"][-1] < ours["losses"][0] - 0.05
