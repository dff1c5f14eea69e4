"""The loss inside the head is the one of whole logits, for every family, ZeRO stage and adapter; or it says why not."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from matrices import covered
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from tunesmith.train.model.output_head import Tail, UnknownHead, find_tail

NUM_STEPS = 8
ADAPTERS = {"none": ["adapter=none"], "lora": ["adapter=lora", "adapter.dropout=0"]}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
# Model type, its settings, and what it does with its logits. The first six are the families of conf/model.
FAMILIES: dict[str, tuple[str, dict[str, Any], Tail]] = {
    "llama": ("llama", {}, Tail()),
    "qwen2": ("qwen2", {}, Tail()),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, Tail()),
    "mistral": ("mistral", {"sliding_window": 16}, Tail()),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_DROPOUT}, Tail()),
    "gpt_oss": ("gpt_oss", GPT_OSS, Tail()),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}, Tail(softcap=5.0)),
    "gemma2 uncapped": ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": None}, Tail()),
    "cohere": ("cohere", {"logit_scale": 0.25}, Tail(scale=0.25)),
    "granite": ("granite", {"logits_scaling": 8.0}, Tail(scale=1 / 8)),
    "phi": ("phi", {"tie_word_embeddings": False}, Tail()),  # the head has a bias
}
TIED = {"qwen3", "gpt2", "gemma2", "gemma2 uncapped", "cohere"}

OverridesOf = Callable[..., list[str]]


def test_the_families_are_tied_and_untied_with_and_without_a_bias(make_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    tied, with_bias = set(), set()
    for name, (model_type, settings, _) in FAMILIES.items():
        model = AutoModelForCausalLM.from_pretrained(make_model(model_type, **settings))
        head = model.get_output_embeddings()
        tied |= {name} if head.weight is model.get_input_embeddings().weight else set()
        with_bias |= {name} if head.bias is not None and head.bias.abs().max() > 0.01 else set()
    assert tied == TIED
    assert with_bias == {"phi"}


# ---------------------------------------------------------------- what a model does with its logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_with_known_logits_tells_scale_and_cap(
    make_model: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    model_type, settings, tail = FAMILIES[family]
    model = AutoModelForCausalLM.from_pretrained(make_model(model_type, **settings), dtype=dtype)
    model.train()
    assert find_tail(model, torch.device("cpu")) == tail
    assert model.training
    assert "forward" not in vars(model.get_output_embeddings())


class Model(nn.Module):
    """A causal language model of one layer; what it does with its logits is given."""

    def __init__(self, tail: Callable[[torch.Tensor], Any], head: nn.Module | None = None, **config: float) -> None:
        super().__init__()
        from transformers import PretrainedConfig

        self.config = PretrainedConfig(**config)
        self.embedding = nn.Embedding(40, 8)
        self.head = head or nn.Linear(8, 40, bias=False)
        self.tail = tail

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.tail(self.head(self.embedding(input_ids))))


@pytest.mark.parametrize(
    ("tail", "config", "expected"),
    [
        (lambda z: z * 4.0, {"logits_scaling": 4.0}, Tail(scale=4.0)),  # hyperclovax
        (lambda z: z / 4.0, {"logits_scaling": 4.0}, Tail(scale=0.25)),  # granite
        (lambda z: z, {"logits_scaling": 4.0}, Tail()),  # minicpm3 divides before the head
        (lambda z: z.mul_(0.5), {"logit_scale": 0.5}, Tail(scale=0.5)),
        (lambda z: 9 * torch.tanh(z * 0.5 / 9), {"output_multiplier": 0.5, "logits_soft_cap": 9.0}, Tail(0.5, 9.0)),
    ],
)
def test_what_a_name_in_the_config_means_is_asked_of_the_model(
    tail: Callable[[torch.Tensor], Any], config: dict[str, float], expected: Tail
) -> None:
    assert find_tail(Model(tail, **config), torch.device("cpu")) == expected


class NormedLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) / self.weight.norm()


@pytest.mark.parametrize(
    ("tail", "config", "reason"),
    [
        (
            lambda z: z * 4.0,
            {},
            "is no scale or soft cap that its config names (scale 1 and soft cap None come closest, 3 off)",
        ),
        (lambda z: z + 0.01, {}, "0.081 off"),
        (
            lambda z: 9 * torch.tanh(z / 9),
            {"final_logit_softcapping": 9.1},
            "scale 1 and soft cap 9.1 come closest, 0.011 off",
        ),
        (lambda z: z.log_softmax(-1), {}, "come closest"),
        (lambda z: z[..., :39], {}, "its logits are (1, 2, 39), its head's output (1, 2, 40)"),
        (lambda z: torch.where(torch.arange(40) == 39, -torch.inf, z), {}, "inf off"),
    ],
)
def test_an_unknown_form_is_refused(tail: Callable[[torch.Tensor], Any], config: dict[str, float], reason: str) -> None:
    with pytest.raises(UnknownHead) as caught:
        find_tail(Model(tail, **config), torch.device("cpu"))
    assert reason in str(caught.value)


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    plain = nn.Linear(8, 40)
    wrapped = Linear(plain, "default", config=LoraConfig(r=2), r=2)
    patched = nn.Linear(8, 40)
    patched.forward = plain.forward  # type: ignore[method-assign]
    for head in (NormedLinear(8, 40), wrapped, patched):
        with pytest.raises(UnknownHead, match="not a plain linear layer"):
            find_tail(Model(lambda z: z, head=head), torch.device("cpu"))
    hooked = nn.Linear(8, 40)
    hooked.register_forward_hook(lambda module, args, logits: logits + 1)
    with pytest.raises(UnknownHead, match="what it does to its logits"):
        find_tail(Model(lambda z: z, head=hooked), torch.device("cpu"))


def test_a_head_that_sees_other_rows_than_the_tokens_is_refused() -> None:
    class LastOnly(Model):
        def forward(self, input_ids: torch.Tensor, **rest: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.head(self.embedding(input_ids[:, -1:])))

    with pytest.raises(UnknownHead, match="not the hidden state of every token once"):
        find_tail(LastOnly(lambda z: z), torch.device("cpu"))

    class Elsewhere(Model):
        def forward(self, input_ids: torch.Tensor, **rest: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.embedding(input_ids) @ self.head.weight.t())

    with pytest.raises(UnknownHead, match="sees nothing"):
        find_tail(Elsewhere(lambda z: z), torch.device("cpu"))


# ---------------------------------------------------------------- whole runs, with kernels and without


def train(rank: Any, overrides: list[str], odd_tail: str | None = None) -> dict[str, Any]:
    """On every rank: a run with an evaluation at its end."""

    if odd_tail is not None:
        register_odd_llama(odd_tail)
    with rank.ready(overrides) as (loop, recorder):
        loop.train()
        return {
            "losses": recorder.losses,
            "norms": [step.grad_norm for step in recorder.steps],
            "evaluations": recorder.evaluations,
            "warnings": recorder.warnings,
            "in_head": loop.session.engine.scorer.is_in_head,
        }


def register_odd_llama(tail: str) -> None:
    """Makes model_type odd_llama a Llama that does something of its own to its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tails = {
        "bent": lambda logits, config: logits - 0.1 * logits.abs(),
        "multiplied": lambda logits, config: logits * config.logits_scaling,
    }

    class OddConfig(LlamaConfig):
        model_type = "odd_llama"
        logits_scaling = 0.5

    class OddLlama(LlamaForCausalLM):
        config_class = OddConfig

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = tails[tail](outputs.logits, self.config)
            return outputs

    AutoConfig.register("odd_llama", OddConfig, exist_ok=True)
    AutoModelForCausalLM.register(OddConfig, OddLlama, exist_ok=True)


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]], make_records: Callable[..., Path]) -> OverridesOf:
    """Overrides of a small fp32 run with an evaluation at its end."""
    own = ["batch.micro_batch_size=4", "batch.packing=none", "optimizer.learning_rate=3e-3", "checkpoint.at_end=false"]
    own += [f"data.validation={make_records(9, seed=1)}", "evaluate.every_steps=1000", "evaluate.batch_size=2"]

    def overrides(*more: str, model: Path | None = None, adapter: str = "none", stage: int = 0) -> list[str]:
        return short_run(stage, NUM_STEPS, *own, *ADAPTERS[adapter], *more, model=model)

    return overrides


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)  # which clipping and Adam would hide
    (figures,), (expected_figures,) = found["evaluations"], expected["evaluations"]
    assert figures["eval/loss"] == pytest.approx(expected_figures["eval/loss"], rel=1e-5)
    assert figures["eval/token_accuracy"] == expected_figures["eval/token_accuracy"]


POINTS = [(family, adapter, checkpointing) for family in FAMILIES for adapter in ADAPTERS for checkpointing in (0, 1)]
QUICK = [*((it, "none", 0) for it in ("llama", "gpt2", "cohere", "phi")), ("gemma2", "lora", 1)]


@pytest.mark.parametrize(("family", "adapter", "checkpointing"), covered(POINTS, QUICK))
def test_the_loss_curve_of_every_family_is_the_one_of_whole_logits(
    ranks: Callable[[int], Any],
    make_model: Callable[..., Path],
    overrides_of: OverridesOf,
    family: str,
    adapter: str,
    checkpointing: int,
) -> None:
    model_type, settings, _ = FAMILIES[family]
    common = overrides_of(
        f"memory.recompute={int(checkpointing)}",
        model=make_model(model_type, **settings),
        adapter=adapter,
    )
    (expected,) = ranks(1).run(train, overrides=[*common, "kernels=off"])
    (found,) = ranks(1).run(train, overrides=[*common, "kernels=torch"])
    assert (found["in_head"], found["warnings"]) == (True, [])
    assert (expected["in_head"], expected["warnings"]) == (False, [])
    assert expected["losses"][-1] < expected["losses"][0] - 0.05  # granite divides its logits by 8
    assert_same(found, expected)


STAGES = list(itertools.product(range(4), ADAPTERS, (False, True)))


@pytest.mark.parametrize(
    ("stage", "adapter", "tie"),
    covered(STAGES, [(0, "none", True), (3, "lora", False)]),
)
def test_the_loss_curve_on_two_ranks_is_the_one_of_whole_logits_at_every_zero_stage(
    ranks: Callable[[int], Any],
    make_model: Callable[..., Path],
    overrides_of: OverridesOf,
    stage: int,
    adapter: str,
    tie: bool,
) -> None:
    model = make_model("llama", tie_word_embeddings=tie)
    few = ["schedule.max_steps=8", "batch.micro_batch_size=2"]  # two forwards to a step
    common = overrides_of(*few, model=model, adapter=adapter, stage=stage)
    expected = ranks(2).run(train, overrides=[*common, "kernels=off"])
    for found in ranks(2).run(train, overrides=[*common, "kernels=torch"]):
        assert found["in_head"]
        assert_same(found, expected[0])


def watched_head(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: where the head's weight is when its input gets a gradient, and what is whole after each step."""

    with rank.ready(overrides) as (loop, _):
        head, parameters = (
            loop.session.engine.module.get_output_embeddings(),
            list(loop.session.engine.module.parameters()),
        )
        in_forward, in_backward, held = [], [], []

        def watch(module: Any, args: tuple[torch.Tensor]) -> None:
            in_forward.append(head.weight.ds_status.name)
            args[0].register_hook(lambda gradient: in_backward.append(head.weight.ds_status.name))

        head.register_forward_pre_hook(watch)
        for _ in range(3):
            loop.step()
            held.append(sum(parameter.data.numel() for parameter in parameters))
        return {"forward": sorted(set(in_forward)), "backward": sorted(set(in_backward)), "held": held}


@pytest.mark.parametrize(
    ("adapter", "tie"), covered(itertools.product(ADAPTERS, (False, True)), [("none", False), ("lora", True)])
)
def test_under_zero_3_a_frozen_head_is_not_gathered_again_and_none_stays_whole(
    ranks: Callable[[int], Any], make_model: Callable[..., Path], overrides_of: OverridesOf, adapter: str, tie: bool
) -> None:
    nothing_stays = [
        f"engine.deepspeed.zero_optimization.stage3_{name}=0"
        for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    ]
    overrides = overrides_of(
        *nothing_stays, model=make_model("llama", tie_word_embeddings=tie), adapter=adapter, stage=3
    )
    for found in ranks(2).run(watched_head, overrides=overrides):
        assert found["forward"] == ["AVAILABLE"]
        assert found["backward"] == ["NOT_AVAILABLE" if adapter == "lora" else "AVAILABLE"]
        assert found["held"] == [0, 0, 0]


def without_targets(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """On every rank: loss and largest gradient of a batch that has targets on the last rank only, and evaluated."""
    with rank.ready(overrides) as (loop, _):
        engine, store = loop.session.engine, loop.run.data.train
        is_last = rank.world.rank == rank.world.world_size - 1
        batch = store.batch([0, 1] if is_last else [-1, -1], pad_token_id=0)
        engine.train()
        gradients: list[torch.Tensor] = []

        def watch(module: Any, args: tuple[torch.Tensor]) -> None:
            args[0].register_hook(gradients.append)

        hook = engine.module.get_output_embeddings().register_forward_pre_hook(watch)
        loss = engine.scorer.nll(batch).loss
        hook.remove()
        engine.backward(loss)
        with torch.no_grad():
            nll = engine.scorer.nll(batch)
        return {
            "loss": loss.item(),
            "gradient": float(gradients[0].abs().max()),
            "sums": [float(nll.loss), float(nll.num_correct)],
        }


@pytest.mark.parametrize(("stage", "adapter"), covered(itertools.product((0, 3), ADAPTERS), [(0, "lora"), (3, "none")]))
def test_a_rank_without_targets_goes_along_and_adds_nothing(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, stage: int, adapter: str
) -> None:
    first, last = ranks(2).run(without_targets, overrides=overrides_of(stage=stage, adapter=adapter))
    assert first == {"loss": 0.0, "gradient": 0.0, "sums": [0.0, 0.0]}
    assert last["loss"] > 1
    assert last["gradient"] > 0
    assert last["sums"][0] == pytest.approx(last["loss"], rel=1e-6)


def largest_saved(rank: Any, overrides: list[str]) -> dict[str, int]:
    """On a rank: numbers in the largest tensor that the forward of a loss saves for its backward, and in the logits."""
    with rank.ready(overrides) as (loop, _):
        batch = loop.run.data.train.batch(range(8), pad_token_id=0)
        saved: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loop.session.engine.scorer.nll(batch)
        vocabulary = loop.session.engine.module.get_output_embeddings().weight.shape[0]
        return {"saved": max(saved), "weight": vocabulary * 32, "logits": batch.num_target_tokens * vocabulary}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nothing_of_the_size_of_the_logits_is_saved(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, adapter: str
) -> None:
    (found,) = ranks(1).run(largest_saved, overrides=overrides_of("kernels=torch", adapter=adapter))
    (whole,) = ranks(1).run(largest_saved, overrides=overrides_of("kernels=off", adapter=adapter))
    assert found["logits"] > 2 * found["weight"]
    assert found["saved"] <= found["weight"]
    assert whole["saved"] >= whole["logits"]


# ---------------------------------------------------------------- unknown heads in whole runs


def odd_llama(make_model: Callable[..., Path], folder: Path) -> Path:
    """A llama whose config names a model type that only register_odd_llama knows."""
    shutil.copytree(make_model(), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "odd_llama", "architectures": ["OddLlama"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("stage", covered([0, 3], [0]))
def test_a_model_that_does_something_unknown_to_its_logits_is_told_and_trains_as_it_is(
    ranks: Callable[[int], Any], make_model: Callable[..., Path], overrides_of: OverridesOf, tmp_path: Path, stage: int
) -> None:
    common = overrides_of(model=odd_llama(make_model, tmp_path / "odd"), stage=stage)
    (expected, _) = ranks(2).run(train, overrides=[*common, "kernels=off"], odd_tail="bent")
    for found in ranks(2).run(train, overrides=[*common, "kernels=torch"], odd_tail="bent"):
        assert not found["in_head"]
        (warning,) = found["warnings"]
        assert warning.startswith("OddLlama computes its loss from whole logits, as with kernels=off")
        assert "what it does to its logits is no scale or soft cap that its config names" in warning
        assert_same(found, expected)


def test_a_scale_of_an_unknown_model_is_found_by_trying_it(
    ranks: Callable[[int], Any], make_model: Callable[..., Path], overrides_of: OverridesOf, tmp_path: Path
) -> None:
    common = overrides_of(model=odd_llama(make_model, tmp_path / "odd"))
    (expected,) = ranks(1).run(train, overrides=[*common, "kernels=off"], odd_tail="multiplied")
    (found,) = ranks(1).run(train, overrides=[*common, "kernels=torch"], odd_tail="multiplied")
    assert (found["in_head"], found["warnings"]) == (True, [])
    assert_same(found, expected)


def test_a_lora_on_the_head_keeps_whole_logits_and_says_so(
    ranks: Callable[[int], Any], overrides_of: OverridesOf
) -> None:
    common = overrides_of("adapter.target_modules=[q_proj,lm_head]", adapter="lora")
    (expected,) = ranks(1).run(train, overrides=[*common, "kernels=off"])
    (found,) = ranks(1).run(train, overrides=common)
    assert not found["in_head"]
    assert any("LlamaForCausalLM computes its loss from whole logits" in warning for warning in found["warnings"])
    assert any("its output head is a Linear, not a plain linear layer" in warning for warning in found["warnings"])
    assert_same(found, expected)


# ---------------------------------------------------------------- bf16


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_in_bf16_runs_with_kernels_and_without_end_within_the_noise_of_seeds(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, adapter: str
) -> None:
    ends: dict[str, list[float]] = {"off": [], "torch": []}
    for seed in (1, 2, 3):
        for kernels, reached in ends.items():
            long = ["engine.precision=bf16", "schedule.max_steps=60", f"seed={seed}", f"kernels={kernels}"]
            (found,) = ranks(1).run(train, overrides=overrides_of(*long, adapter=adapter))
            reached.append(found["evaluations"][-1]["eval/loss"])
            assert found["losses"][-1] < found["losses"][0] - 1
    noise = stdev(ends["off"])
    assert all(abs(on - off) < noise for on, off in zip(ends["torch"], ends["off"], strict=True))
