"""PEFT's LoRA layers on our kernels: the same numbers, the same files, and PEFT itself wherever they do not reach."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import covered
from torch import nn

from tunesmith.train.config.config import Kernels
from tunesmith.train.model.load import quiet_transformers
from tunesmith.train.model.lora_layers import use_lora_kernels

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
IDS = torch.tensor([[5, 9, 200, 31, 7, 8, 1000, 3], [77, 6, 6, 12, 90, 2000, 14, 15]])

Adapted = Callable[..., Any]


@pytest.fixture(scope="module")
def adapted(make_model: Callable[..., Path]) -> Adapted:
    """adapted("gpt2", use_dora=True) is a PEFT model in float64 with adapters that do something."""

    def make(model_type: str = "llama", dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = make_model(model_type, **(GPT2 if model_type == "gpt2" else {}))
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "fan_in_fan_out": model_type == "gpt2"}
        with quiet_transformers():
            model = get_peft_model(
                base, LoraConfig(task_type="CAUSAL_LM", **(settings | lora)), autocast_adapter_dtype=False
            )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
            if "magnitude" in name:
                parameter.data *= 1.3
        return model

    return make


def on_our_kernels(model: Any) -> Any:
    """A copy of a model, on our kernels; nothing is left to PEFT."""
    ours = copy.deepcopy(model)
    assert use_lora_kernels(ours, Kernels.torch, sharded=False) == []
    return ours


def step(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """Logits and the gradients of a loss."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.log_softmax(-1)[..., 3].sum() / 7).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def worst(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest relative norm of an error."""
    assert found.keys() == right.keys()
    return max(((found[name] - value).norm() / value.norm()).item() for name, value in right.items())


def layers_of(model: Any) -> list[Any]:
    from peft.tuners.lora.layer import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_logits_and_gradients_are_pefts(model_type: str, lora: dict[str, Any], adapted: Adapted) -> None:
    theirs = adapted(model_type, **lora)
    assert worst(step(on_our_kernels(theirs)), step(theirs)) < 1e-12


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_weights_that_are_stored_transposed_give_pefts_numbers(lora: dict[str, Any], adapted: Adapted) -> None:
    theirs = adapted("gpt2", **lora)
    assert worst(step(on_our_kernels(theirs)), step(theirs)) < 1e-12


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_float32_differs_from_peft_by_rounding_alone(lora: dict[str, Any], adapted: Adapted) -> None:
    exact, theirs = step(adapted(**lora)), adapted(dtype=torch.float32, **lora)
    found, right = step(on_our_kernels(theirs)), step(theirs)
    assert worst({"logits": found["logits"]}, {"logits": right["logits"]}) < 1e-6
    assert worst(found, exact) < 2 * worst(right, exact)


def test_doras_dropout_is_pefts_with_our_mask(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT is given our mask in place of its own; the seeds are those that our layers draw."""
    from tunesmith.kernels.philox import dropout
    from tunesmith.train.model.lora_layers import draw_seed

    def ours(x: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
        drop = dropout(p, draw_seed(p))
        assert drop is not None
        return x * drop.keep(x[..., 0].numel(), x.shape[-1], x.device).view(x.shape) * drop.keep_scale

    theirs = adapted(use_dora=True, lora_dropout=0.25).train()
    model = on_our_kernels(theirs)
    torch.manual_seed(3)
    found = step(model)
    monkeypatch.setattr(nn.functional, "dropout", ours)
    torch.manual_seed(3)
    assert worst(found, step(theirs)) < 1e-12


def test_q_k_v_and_gate_up_are_computed_together(adapted: Adapted) -> None:
    model = on_our_kernels(adapted())
    made: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda *given, name=name: made.setdefault(name, []).append(given[2].grad_fn))
    model(input_ids=IDS)
    together = [{made[f"{name}"][0] for name in made if f"layers.0.{part}" in name} for part in ("self_attn", "mlp")]
    assert [len(nodes) for nodes in together] == [2, 2]  # q, k, v and o; gate, up and down
    assert all(len(nodes) == 1 for nodes in made.values())


class Tricky(nn.Module):
    """Projections that are not always given what their siblings are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, size).double() for size in (5, 4, 3))

    def forward(self, x: torch.Tensor, how: str) -> list[torch.Tensor]:
        q = self.q_proj(x)
        if how == "another tensor":
            return [q, self.k_proj(x + 1), self.v_proj(x)]
        if how == "twice":
            return [q, self.q_proj(x), self.k_proj(x), self.k_proj(x), self.v_proj(x)]
        if how == "changed in place":
            x.add_(1)
        if how == "without gradient":
            with torch.no_grad():
                return [q, self.k_proj(x), self.v_proj(x)]
        if how == "an error":
            raise OverflowError
        return [q, self.k_proj(x), self.v_proj(x)]


@pytest.fixture
def tricky() -> tuple[Any, Any]:
    """PEFT's and ours."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(Tricky(), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    for name, parameter in theirs.named_parameters():
        parameter.data = parameter.data.double()
        if "lora_B" in name:
            parameter.data.normal_()
    return theirs, on_our_kernels(theirs)


@pytest.mark.parametrize("how", ["as usual", "another tensor", "twice", "changed in place", "without gradient"])
def test_grouping_never_decides_what_comes_out(how: str, tricky: tuple[Any, Any]) -> None:
    results = []
    for model in tricky:
        outputs = model(torch.ones(2, 6).double() / 3, how)
        if how != "changed in place":  # then neither has a gradient
            sum(output.square().sum() for output in outputs).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([*outputs, *(gradient for gradient in gradients if gradient is not None)])
    assert len(results[0]) == len(results[1])
    assert all(one.requires_grad == other.requires_grad for one, other in zip(*results, strict=True))
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(*results, strict=True))


def test_a_group_member_can_be_called_outside_its_parent(tricky: tuple[Any, Any]) -> None:
    theirs, ours = tricky
    x = torch.ones(2, 6).double()
    for _ in range(2):  # nothing is kept from one to the next
        x = x / 2
        assert torch.allclose(ours.model.k_proj(x), theirs.model.k_proj(x), rtol=0, atol=1e-12)
        assert torch.allclose(ours.model.q_proj(x), theirs.model.q_proj(x), rtol=0, atol=1e-12)


def test_inference_mode_gives_the_same(tricky: tuple[Any, Any]) -> None:
    theirs, ours = tricky
    with torch.inference_mode():
        x = torch.ones(2, 6).double() / 3
        for one, other in zip(ours(x, "changed in place"), theirs(x - 1, "changed in place"), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_an_error_in_the_parent_leaves_nothing_behind(tricky: tuple[Any, Any]) -> None:
    _, ours = tricky
    x = torch.ones(2, 6).double()
    seen = weakref.ref(x)
    with pytest.raises(OverflowError):
        ours(x, "an error")
    del x
    gc.collect()
    assert seen() is None


def test_recomputation_in_a_checkpointed_model_drops_the_same_elements(adapted: Adapted) -> None:
    theirs = adapted(lora_dropout=0.3)
    found = []
    for checkpointed in (False, True):
        model = on_our_kernels(theirs)
        if checkpointed:
            model.enable_input_require_grads()
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(4)
        found.append(step(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_dropout_follows_the_seed_and_stops_outside_training(adapted: Adapted) -> None:
    model = on_our_kernels(adapted(lora_dropout=0.3)).train()
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(model(input_ids=IDS).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_saved_adapter_is_pefts(adapted: Adapted, make_model: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    theirs = adapted(use_dora=True)
    ours = on_our_kernels(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert list(files[0]) == list(files[1])
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    base = AutoModelForCausalLM.from_pretrained(make_model(), dtype=torch.float64)
    with quiet_transformers():
        opened = PeftModel.from_pretrained(base, tmp_path / "ours", autocast_adapter_dtype=False)
    assert worst({"logits": opened(input_ids=IDS).logits}, {"logits": ours.eval()(input_ids=IDS).logits}) < 1e-12


def test_what_peft_can_be_asked_for_later_it_still_does(adapted: Adapted) -> None:
    theirs = adapted().eval()
    ours = on_our_kernels(theirs)

    def same() -> bool:
        logits = [model(input_ids=IDS).logits for model in (ours, theirs)]
        return torch.allclose(*logits, rtol=0, atol=1e-12)

    adapted_logits = theirs(input_ids=IDS).logits
    with ours.disable_adapter(), theirs.disable_adapter():
        assert same()
        assert not torch.allclose(theirs(input_ids=IDS).logits, adapted_logits)
    names = ["default", "__base__"]
    found, right = (model(input_ids=IDS, adapter_names=names).logits for model in (ours, theirs))
    assert torch.allclose(found, right, rtol=0, atol=1e-12)
    for model in (ours, theirs):
        model.merge_adapter()
    assert same()
    for model in (ours, theirs):
        model.unmerge_adapter()
    for model in (ours, theirs):
        torch.manual_seed(8)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.set_adapter("other")
    assert same()
    merged = [model.merge_and_unload()(input_ids=IDS).logits for model in (ours, theirs)]
    assert torch.allclose(*merged, rtol=0, atol=1e-12)


def test_a_copy_of_a_model_computes_with_its_own_weights(adapted: Adapted) -> None:
    ours = on_our_kernels(adapted())
    other = copy.deepcopy(ours)
    before = step(ours)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert step(other)["logits"].abs().max() == 0
    assert worst(step(ours), before) == 0


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"model_type": "qwen2", "target_modules": ["q_proj", "k_proj"], "lora_bias": True}, "lora_B has a bias"),
        ({"target_modules": ["embed_tokens"]}, "the base layer is Embedding, not Linear"),
        ({"alora_invocation_tokens": [5]}, "ALora is a variant our kernels do not know"),
    ],
)
def test_what_we_do_not_cover_runs_through_peft_and_is_said(lora: dict[str, Any], words: str, adapted: Adapted) -> None:
    theirs = adapted(**lora).eval()
    ours = copy.deepcopy(theirs)
    (note,) = use_lora_kernels(ours, Kernels.torch, sharded=False)
    assert words in note
    assert note.startswith("LoRA on ")
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_hooks_several_adapters_and_mixed_dtypes_are_left_to_peft(adapted: Adapted) -> None:
    model = adapted(target_modules=["q_proj", "o_proj"])
    q0, o0, q1, o1 = layers_of(model)
    q0.base_layer.register_forward_hook(lambda *_: None)
    q1.lora_A.to(torch.float32)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    o0.set_adapter(["default", "other"])
    notes = use_lora_kernels(model, Kernels.torch, sharded=False)
    assert sorted(note.split(": ")[1] for note in notes) == [
        "2 adapters are active, not one",
        "hooks inside it would not run",
        "its weights are of float32, float64",
    ]
    assert sum("forward" in vars(layer) for layer in (q0, o0, q1, o1)) == 1


def test_an_input_of_another_dtype_and_autocast_go_through_peft_with_a_warning(tricky: tuple[Any, Any]) -> None:
    theirs, ours = tricky
    for model in tricky:
        model.float()
    x = torch.ones(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="met autocast: it runs through PEFT there"):
            found = ours(x, "as usual")
        assert [y.dtype for y in found] == [torch.bfloat16] * 3
        assert all(torch.equal(one, other) for one, other in zip(found, theirs(x, "as usual"), strict=True))
    assert all(
        torch.allclose(one, other) for one, other in zip(ours(x, "as usual"), theirs(x, "as usual"), strict=True)
    )


def test_off_leaves_the_model_alone(adapted: Adapted) -> None:
    model = adapted()
    assert use_lora_kernels(model, Kernels.off, sharded=False) == []
    assert not any("forward" in vars(layer) for layer in layers_of(model))


# ---------------------------------------------------------------- whole runs on ranks


def curve(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: losses, warnings, layers on our kernels, and whole weights held after the last step."""

    with rank.ready(overrides) as (loop, recorder):
        loop.train()
        module = loop.session.engine.module
        return {
            "losses": recorder.losses,
            "warnings": recorder.warnings,
            "ours": sum("forward" in vars(layer) for layer in module.modules() if hasattr(layer, "lora_A")),
            "held": sum(parameter.data.numel() for parameter in module.parameters()),
        }


@pytest.mark.parametrize(
    ("stage", "model_type", "adapter", "checkpointing"),
    covered(
        [
            (0, "llama", "lora", "true"),
            (1, "qwen2", "rslora", "false"),
            (2, "llama", "dora", "true"),
            (3, "llama", "lora", "false"),
            (3, "qwen2", "dora", "true"),
            (3, "gpt2", "lora", "false"),
        ],
        [(1, "qwen2", "rslora", "false"), (2, "llama", "dora", "true")],
    ),
)
def test_the_loss_curve_is_pefts_at_every_stage(
    ranks: Callable[[int], Any],
    short_run: Callable[..., list[str]],
    make_model: Callable[..., Path],
    stage: int,
    model_type: str,
    adapter: str,
    checkpointing: str,
) -> None:
    own = [
        f"memory={'recompute' if checkpointing == 'true' else 'keep'}",
        f"adapter={adapter}",
        "checkpoint.at_end=false",
    ]
    own += ["batch.global_batch_size=4", "batch.micro_batch_size=1", "optimizer.learning_rate=1e-2"]
    model = make_model(model_type, **(GPT2 if model_type == "gpt2" else {}))
    common = short_run(stage, 3, *own, records=13, splits_all=True, model=model)
    expected = ranks(2).run(curve, overrides=[*common, "kernels=off"])
    found = ranks(2).run(curve, overrides=[*common, "kernels=torch"])
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs["ours"] == 0
        assert ours["ours"] == (8 if model_type == "gpt2" else 14)
        assert ours["warnings"] == []
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0, abs=1e-5)
        assert ours["losses"][-1] < ours["losses"][0] - 0.05  # the adapter learns: equal losses say something
        if stage == 3:
            assert ours["held"] == 0
