"""linear_cross_entropy against its formulas in float64: every option, gradient and back end.

The Triton back ends run in the interpreter's process (conftest.py), where tiles are 16 x 64 x 32 and a row's block 256.
Where a row is nearly certain or hopeless, logits are multiples of 1/16: products then carry no rounding of their own,
and what is left is the error of the loss itself.
"""

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tunesmith.kernels.lce import backends
from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy

LIMIT = 2e-6  # relative norm, float32
BACKENDS = ("torch", "chunked", "anchored")
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "cap": {"logit_softcap": 3.0},
    "scale": {"logit_scale": -0.75},
    "all": {"logit_softcap": 5.0, "logit_scale": 1.5},
}


def reference(
    hidden: torch.Tensor,
    unembed: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and statistics of each token as a textbook writes them, with the label's probability left to log-softmax."""
    z = hidden @ unembed.T
    z = (z if bias is None else z + bias) * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    logprob = z.log_softmax(-1)
    kept = labels >= 0
    index = labels.clamp(min=0)[:, None]
    nll = -logprob.gather(1, index)[:, 0]
    entropy = -(logprob.exp() * logprob).sum(-1)
    correct = z.gather(1, index)[:, 0] >= z.amax(-1)
    stats = {"logprob": -nll, "entropy": entropy, "correct": correct.double()}
    return torch.where(kept, nll, 0), {name: torch.where(kept, value, 0) for name, value in stats.items()}


def inputs(kind: str, T: int, D: int, V: int, masked: float) -> dict[str, torch.Tensor]:
    """Seeded tensors. certain: nll from 1e-10 to 1e-2; hopeless: up to hundreds of nats."""
    lots = torch.Generator().manual_seed(T * 7919 + D * 31 + V)
    labels = torch.randint(0, V, (T,), generator=lots)
    hidden = torch.randn(T, D, generator=lots)
    unembed = torch.randn(V, D, generator=lots)
    if kind in ("certain", "hopeless"):
        hidden, unembed = ((4 * tensor).round() / 4 for tensor in (hidden, unembed))
        labels = torch.arange(T) % 3  # each of three tokens has a hidden channel of its own
        unembed[:, :3] = torch.eye(V, 3)
        heights = torch.linspace(16, 40, T) if kind == "certain" else torch.linspace(-900, -60, T)
        hidden[:, :3] = torch.eye(3)[labels] * heights.round()[:, None]
    elif kind == "moderate":
        hidden = hidden / 10
    elif kind == "small":
        hidden = hidden / 1000
    elif kind == "large":
        hidden = hidden * 10
    labels[torch.rand(T, generator=lots) < masked] = -100
    return {
        "hidden": hidden,
        "unembed": unembed,
        "labels": labels,
        "bias": (4 * torch.randn(V, generator=lots)).round() / 4,
        "weights": torch.rand(T, generator=lots) * 2,
        "upstream": torch.randn(T, generator=lots),
    }


def error(found: torch.Tensor | None, exact: torch.Tensor) -> float:
    """Relative norm of the difference; of an exact zero, the norm itself."""
    assert found is not None
    return float((found.double() - exact).norm() / (exact.norm() or 1.0))


def compare(
    backend: str,
    option: str = "plain",
    kind: str = "normal",
    T: int = 19,
    D: int = 24,
    V: int = 147,
    masked: float = 0.3,
    reduction: str = "sum",
    biased: bool = False,
    trains: str = "both",
    chunks: int = 2,
    stats: bool = True,
) -> dict[str, float]:
    """Errors of loss, gradients and statistics, by name."""
    given = inputs(kind, T, D, V, masked)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    leaves = {"hidden": trains in ("both", "hidden"), "unembed": trains in ("both", "head")}
    leaves["bias"] = biased and trains in ("both", "head")
    for name, needed in leaves.items():
        given[name].requires_grad_(needed)
        wide[name].requires_grad_(needed)
    settings: dict[str, Any] = OPTIONS[option]
    exact, exact_stats = reference(
        wide["hidden"], wide["unembed"], wide["labels"], wide["bias"] if biased else None, **settings
    )
    exact = exact * wide["weights"]
    exact_end = exact.sum() * 1.75 if reduction == "sum" else (exact * wide["upstream"]).sum()
    exact_end.backward()
    with patch.object(backends, "CPU_SLAB_BYTES", 4 * V * 3 * max(1, T // chunks)):
        result = linear_cross_entropy(
            given["hidden"], given["unembed"], given["labels"], bias_V=given["bias"] if biased else None,
            weights_T=given["weights"], reduction=reduction, return_stats=stats, backend=backend, **settings,
        )  # fmt: skip
        loss, found_stats = result if stats else (result, None)
        end = loss * 1.75 if reduction == "sum" else (loss * given["upstream"]).sum()
        end.backward()
    largest = float((wide["hidden"] @ wide["unembed"].T).detach().abs().max())
    errors = {"loss": error(loss.detach(), (exact.sum() if reduction == "sum" else exact).detach())}
    errors |= {f"grad_{n}": error(given[n].grad, wide[n].grad) for n, needed in leaves.items() if needed}
    if found_stats is not None:
        errors |= {n: error(getattr(found_stats, f"{n}_T"), exact_stats[n].detach()) for n in exact_stats}
    if kind == "large":  # a logit of 250 carries 2^-24 x 250 of a float32 product's own rounding into its exp
        errors = {name: value / max(1.0, 2**-23 * largest / LIMIT) for name, value in errors.items()}
    return errors


@pytest.fixture(params=BACKENDS)
def run(
    request: pytest.FixtureRequest, interpreter: Any, record_property: Callable[[str, object], None]
) -> Callable[..., dict[str, float]]:
    """compare() of one back end, where it can run; make kernels-check shows the largest error of all."""
    backend = request.param

    def errors(**arguments: Any) -> dict[str, float]:
        here = backend == "torch"
        found = compare(backend, **arguments) if here else interpreter.run(compare, backend=backend, **arguments)
        record_property("max_rel_err", max(found.values()))
        return found

    return errors


def assert_exact(errors: dict[str, float]) -> None:
    assert {name: value for name, value in errors.items() if not value <= LIMIT} == {}


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_and_gradient_equals_float64(option, reduction, run):
    assert_exact(run(option=option, reduction=reduction))


@pytest.mark.parametrize(
    ("T", "D", "V"),
    [(1, 1, 1), (1, 8, 2), (2, 1, 3), (3, 7, 13), (16, 32, 64), (17, 33, 65), (15, 31, 63), (5, 64, 128), (7, 4, 1031)],
)  # one; odd; prime; exactly a tile, one more and one less in each dimension
def test_every_shape_equals_float64(T, D, V, run):
    assert_exact(run(T=T, D=D, V=V, masked=0.0))


@pytest.mark.parametrize("kind", ["certain", "hopeless", "small", "large"])
@pytest.mark.parametrize("biased", [False, True])
def test_certain_hopeless_tiny_and_large_logits_stay_exact(biased, kind, run):
    assert_exact(run(kind=kind, biased=biased))


@pytest.mark.parametrize("trains", ["hidden", "head", "both", "none"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_what_needs_a_gradient_gets_one(reduction, trains, run):
    if trains == "none":
        with pytest.raises(BaseException, match="does not require grad"):
            run(trains=trains, reduction=reduction)
    else:
        assert_exact(run(trains=trains, reduction=reduction, biased=True))


def test_gradients_without_statistics_are_the_same(run):
    assert_exact(run(stats=False))


def test_a_head_with_a_bias_and_no_trained_head(run):
    assert_exact(run(biased=True, trains="hidden", option="all"))


def test_a_cap_on_small_logits_where_tanh_is_nearly_straight(run):
    assert_exact(run(kind="moderate", option="cap"))


def row_errors(backend: str) -> float:
    """Largest relative error of any one row's loss, from 1e-2 down to 1e-10 nats."""
    given = inputs("certain", 19, 24, 131, 0.0)
    found = linear_cross_entropy(given["hidden"], given["unembed"], given["labels"], reduction="none", backend=backend)
    # log-softmax has nothing left of the smallest in float64 either: log(1 + exp(o - a)) from the others alone
    z = given["hidden"].double() @ given["unembed"].double().T
    label = z.gather(1, given["labels"][:, None])
    others = z.scatter(1, given["labels"][:, None], -math.inf).logsumexp(1)
    exact = torch.log1p(torch.exp(others - label[:, 0]))
    return float(((found - exact) / exact).abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_nearly_certain_row_is_exact_by_itself(backend, interpreter):
    # exp of a difference of 30 nats: 30 x 2^-24 of the argument's own rounding
    assert (row_errors(backend) if backend == "torch" else interpreter.run(row_errors, backend=backend)) < 4e-6


def test_all_rows_masked_give_zero_and_zero_gradients(run):
    assert all(value == 0 for value in run(masked=1.1).values())


def test_the_hidden_gradient_of_nearly_certain_tokens_is_not_lost():
    """Where log-softmax minus one-hot has nothing left: 1 - p is 1e-10, far below float32's step at 1."""
    hidden = torch.tensor([[24.0, 0.5]], requires_grad=True)
    unembed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    linear_cross_entropy(hidden, unembed, torch.tensor([0])).backward()
    q = (math.exp(0.5) + math.exp(-0.5)) / (math.exp(24) + math.exp(0.5) + math.exp(-0.5))
    assert hidden.grad[0, 0].item() == pytest.approx(-q, rel=2e-6)


def bitwise_twice(backend: str) -> bool:
    """Whether two runs on the same tensors agree in every bit."""
    results = []
    for _ in range(2):
        given = inputs("normal", 21, 24, 200, 0.2)
        hidden, unembed = given["hidden"].requires_grad_(), given["unembed"].requires_grad_()
        with patch.object(backends, "CPU_SLAB_BYTES", 4 * 200 * 8):
            loss = linear_cross_entropy(hidden, unembed, given["labels"], backend=backend)
        loss.backward()
        results.append((loss.detach(), hidden.grad, unembed.grad))
    return all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_repeats_to_the_last_bit(backend, interpreter):
    assert bitwise_twice(backend) if backend == "torch" else interpreter.run(bitwise_twice, backend=backend)


def test_gradcheck_in_float64():
    given = inputs("normal", 5, 3, 11, 0.3)
    wide = [given[name].double().requires_grad_() for name in ("hidden", "unembed", "bias")]
    for reduction in ("sum", "none"):
        for settings in OPTIONS.values():
            assert torch.autograd.gradcheck(
                lambda h, w, b, r=reduction, s=settings: linear_cross_entropy(
                    h, w, given["labels"], bias_V=b, reduction=r, **s
                ),
                wide,
            )


def test_a_second_derivative_is_refused():
    hidden = torch.randn(2, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 3), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def bfloat16_errors(backend: str) -> dict[str, float]:
    """Errors of loss and gradients over those of rounding the exact answers to bfloat16."""
    given = inputs("normal", 33, 64, 500, 0.2)
    hidden, unembed = (given[name].bfloat16().requires_grad_() for name in ("hidden", "unembed"))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, unembed)]
    exact, _ = reference(*wide, given["labels"], None)
    exact.sum().backward()
    with patch.object(backends, "CPU_SLAB_BYTES", 2 * 500 * 16):
        loss = linear_cross_entropy(hidden, unembed, given["labels"], backend=backend)
    loss.backward()
    errors = {"loss": error(loss.detach(), exact.sum().detach())}
    for name, found, expected in zip(("hidden", "unembed"), (hidden, unembed), wide, strict=True):
        assert expected.grad is not None
        errors[name] = error(found.grad, expected.grad) / error(expected.grad.bfloat16(), expected.grad)
    return errors


@pytest.mark.parametrize("backend", ["chunked", "anchored"])
def test_bfloat16_under_the_interpreter_is_nothing_but_rounded(backend, interpreter):
    """The interpreter truncates where a GPU rounds, which doubles each rounding: of E or the logits, of the result."""
    errors = interpreter.run(bfloat16_errors, backend=backend)
    assert errors.pop("loss") < (LIMIT if backend == "anchored" else 1e-3)
    # chunked rounds logits of about 20 to 8 bits, which is the weakness that anchored does not have
    assert max(errors.values()) < (4 if backend == "anchored" else 30)


def test_bfloat16_on_the_cpu_is_as_exact_as_its_result_can_be():
    errors = bfloat16_errors("torch")
    assert errors.pop("loss") < LIMIT
    assert max(errors.values()) < 1.05


def test_a_divisor_among_the_weights_costs_no_second_rounding():
    given = inputs("normal", 65, 64, 500, 0.0)
    hidden = given["hidden"].bfloat16().requires_grad_()
    unembed = given["unembed"].bfloat16()
    wide = hidden.detach().double().requires_grad_()
    exact, _ = reference(wide, unembed.double(), given["labels"], None)
    (exact.sum() / 1237).backward()
    assert wide.grad is not None
    rounding = error(wide.grad.bfloat16(), wide.grad)
    linear_cross_entropy(hidden, unembed, given["labels"], weights_T=torch.full((65,), 1 / 1237)).backward()
    assert error(hidden.grad, wide.grad) < 1.05 * rounding
    hidden.grad = None
    (linear_cross_entropy(hidden, unembed, given["labels"]) / 1237).backward()
    assert error(hidden.grad, wide.grad) > 1.2 * rounding  # what the loop avoids
