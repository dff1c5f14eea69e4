"""What users do with linear_cross_entropy and lora_linear besides calling them once: autocast, no_grad, checkpoints,
two backward passes, changes in place, torch.compile, tokens that are ruled out, float16 with small weights.
"""

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tunesmith.kernels.lce import backends
from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy
from tunesmith.kernels.lora.lora_linear import dora_linear, lora_linear, lora_linear_group

LIMIT = 2e-6
LOSS_BACKENDS = ("torch", "chunked", "anchored")
LORA_BACKENDS = ("torch", "triton")
T, D, V = 13, 24, 131


def loss_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, unembed, and labels of which every fourth is ignored."""
    lots = torch.Generator().manual_seed(3)
    labels = torch.randint(0, V, (T,), generator=lots)
    labels[::4] = -100
    return torch.randn(T, D, generator=lots).to(dtype), torch.randn(V, D, generator=lots).to(dtype), labels


def gradients(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The sum of a function's result, and its gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    end = function(*leaves).sum()
    end.backward()
    found = [end.detach(), *(leaf.grad for leaf in leaves)]
    assert None not in found
    return found  # type: ignore[return-value]


def worst(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest relative norm of a difference."""
    return max(float((a.double() - b).norm() / b.double().norm()) for a, b in zip(found, right, strict=True))


def here_or(interpreter: Any, function: Callable[..., Any], backend: str, **arguments: Any) -> Any:
    """What a function of this file returns in the process where its back end runs."""
    if backend == "torch":
        return function(backend=backend, **arguments)
    return interpreter.run(function, backend=backend, **arguments)


def textbook(
    hidden: torch.Tensor, unembed: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    logits = hidden @ unembed.T if bias is None else hidden @ unembed.T + bias
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


# ---------------------------------------------------------------- the loss


def loss_under_autocast(backend: str, reduction: str) -> bool:
    hidden, unembed, labels = loss_inputs()

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, reduction=reduction, backend=backend)

    plain = gradients(loss, hidden, unembed)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(loss, hidden, unembed)
    return all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_changes_no_bit_of_the_loss(reduction, backend, interpreter):
    assert here_or(interpreter, loss_under_autocast, backend, reduction=reduction)


MATRIX_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.matmul}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in MATRIX_PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_loss_without_autograd_makes_no_gradient(context):
    hidden, unembed, labels = loss_inputs()
    hidden.requires_grad_()
    unembed.requires_grad_()
    with context(), Products() as products:
        found, stats = linear_cross_entropy(hidden, unembed, labels, return_stats=True)
    assert products.count == 1
    assert not found.requires_grad
    with Products() as products:
        again, stats_again = linear_cross_entropy(hidden, unembed, labels, return_stats=True)
    assert products.count == 3
    assert torch.equal(found, again.detach())
    assert all(torch.equal(a, b) for a, b in zip(stats, stats_again, strict=True))


def loss_in_graphs(backend: str) -> dict[str, float]:
    """Errors of gradients after: two backward passes, two uses in a graph, checkpoints, weights below and at 0."""
    hidden, unembed, labels = loss_inputs()
    wide = hidden.double(), unembed.double()
    weights = torch.linspace(-2, 2, T).round()

    def ours(h: torch.Tensor, w: torch.Tensor, **more: Any) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, backend=backend, **more)

    right = gradients(lambda h, w: textbook(h, w, labels), *wide)
    found = {}
    for reduction in ("sum", "none"):
        h, w = hidden.clone().requires_grad_(), unembed.clone().requires_grad_()
        end = ours(h, w, reduction=reduction).sum()
        end.backward(retain_graph=True)
        end.backward()
        assert h.grad is not None
        assert w.grad is not None
        found[f"two backward passes, {reduction}"] = worst([h.grad / 2, w.grad / 2], right[1:])
        for reentrant in (False, True):
            saved = gradients(
                lambda h, w, r=reduction, e=reentrant: checkpoint(  # type: ignore[misc]
                    lambda h, w: ours(h * 1, w, reduction=r), h, w, use_reentrant=e
                ),
                hidden,
                unembed,
            )
            found[f"checkpoint, {reduction}, {reentrant}"] = worst(saved, right)
        weighed = gradients(lambda h, w, r=reduction: ours(h, w, weights_T=weights, reduction=r), hidden, unembed)
        exact = gradients(lambda h, w: textbook(h, w, labels) * weights, *wide)
        found[f"weights, {reduction}"] = worst(weighed, exact)
        zero = gradients(lambda h, w, r=reduction: ours(h, w, weights_T=0 * weights, reduction=r), hidden, unembed)
        found[f"weights of 0, {reduction}"] = max(float(tensor.abs().max()) for tensor in zero)
    twice = gradients(lambda h, w: 3 * ours(h, w) + ours(2 * h, w), hidden, unembed)
    exact = gradients(lambda h, w: 3 * textbook(h, w, labels) + textbook(2 * h, w, labels), *wide)
    with patch.object(backends, "CPU_SLAB_BYTES", 1):
        one_by_one = gradients(ours, hidden, unembed)
    return found | {"two uses": worst(twice, exact), "rows one by one": worst(one_by_one, right)}


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
def test_the_loss_is_right_however_its_graph_is_used(backend, interpreter):
    found = here_or(interpreter, loss_in_graphs, backend)
    assert {name: value for name, value in found.items() if not value <= LIMIT} == {}


def ruled_out(backend: str) -> dict[str, float]:
    """Errors where a bias of -inf rules a third of the tokens out, whole tiles and the first one among them."""
    hidden, unembed, labels = loss_inputs()
    bias = torch.zeros(V)
    bias[0], bias[30:100] = -torch.inf, -torch.inf
    labels = torch.where((labels >= 0) & (bias[labels.clamp(min=0)] < 0), 7, labels)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, bias_V=bias, backend=backend)

    right = gradients(lambda h, w: textbook(h, w, labels, bias.double()), hidden.double(), unembed.double())
    errors = {"gradients": worst(gradients(loss, hidden, unembed), right)}
    _, stats = linear_cross_entropy(hidden, unembed, labels, bias_V=bias, backend=backend, return_stats=True)
    logprobs = (hidden.double() @ unembed.double()[bias == 0].T).log_softmax(-1)
    entropy = torch.where(labels >= 0, -(logprobs.exp() * logprobs).sum(-1), 0)
    return errors | {"entropy": worst([stats.entropy_T], [entropy])}


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
def test_tokens_that_cannot_be_leave_loss_gradients_and_entropy_exact(backend, interpreter):
    found = here_or(interpreter, ruled_out, backend)
    assert {name: value for name, value in found.items() if not value <= LIMIT} == {}


def overflowed(backend: str) -> list[bool]:
    """Whether a label whose logit is infinite has neither a loss nor a log-probability."""
    hidden, unembed, _ = loss_inputs()
    bias = torch.zeros(V)
    bias[5] = torch.inf
    with warnings.catch_warnings():  # NumPy, under the interpreter, says that infinity - infinity is none
        warnings.simplefilter("ignore", RuntimeWarning)
        loss, stats = linear_cross_entropy(
            hidden, unembed, torch.full((T,), 5), bias_V=bias, backend=backend, return_stats=True
        )
    return [bool(loss.isnan()), bool(stats.logprob_T.isnan().all())]


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
def test_a_label_whose_logit_overflowed_is_no_certainty(backend, interpreter):
    assert all(here_or(interpreter, overflowed, backend))


def mean_in_float16(backend: str) -> dict[str, float]:
    """Errors over those of rounding the exact answers, of losses with weights of 1e-4, and times 1e-4 afterwards."""
    hidden, unembed, labels = loss_inputs(torch.float16)
    hidden = hidden / 4
    right = gradients(lambda h, w: 8 * textbook(h, w, labels), hidden.double(), unembed.double())[1:]
    rounded = [worst([tensor.half()], [tensor]) for tensor in right]
    small = torch.full((T,), 1e-4)

    def inside(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, weights_T=small, backend=backend) * 8e4

    def after(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (linear_cross_entropy(h, w, labels, reduction="none", backend=backend) * 1e-4) * 8e4

    def later(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # the loss scale is taken out of the gradients
        return linear_cross_entropy(h, w, labels, reduction="none", backend=backend) * 1e-4

    found = {}
    for name, function in (("inside", inside), ("after", after)):
        pairs = zip(gradients(function, hidden, unembed)[1:], right, rounded, strict=True)
        found[name] = max(worst([one], [exact]) / floor for one, exact, floor in pairs)
    exact = [tensor * 1e-4 / 8 for tensor in right]
    pairs = zip(gradients(later, hidden, unembed)[1:], exact, strict=True)
    found["later"] = max(worst([one], [other]) / worst([other.half()], [other]) for one, other in pairs)
    return found


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. backend chunked instead of anchored")
@pytest.mark.parametrize("backend", ["torch", "chunked"])
def test_small_weights_do_not_sink_below_float16(backend, interpreter):
    found = here_or(interpreter, mean_in_float16, backend)
    assert max(found.values()) < 1.5, found


# ---------------------------------------------------------------- LoRA


def lora_inputs() -> list[torch.Tensor]:
    """x, weight, A, B and a bias."""
    lots = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=lots) for shape in ((2, 9, 20), (11, 20), (4, 20), (11, 4), (11,))]


def lora_in_graphs(backend: str) -> dict[str, float]:
    """Errors under autocast, in a checkpoint of either kind, and after a change of the output in place."""

    def ours(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, w, a, b, 0.7, bias=bias, dropout_p=0.3, seed=9, backend=backend)  # type: ignore[arg-type]

    def dora(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return dora_linear(x, w, a, b, bias, 0.7, dropout_p=0.3, seed=9, backend=backend)  # type: ignore[arg-type]

    def joined(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        first, second = lora_linear_group(
            x, [w, w], [a, a], [b, b], [0.7, 0.7], biases=[bias, bias], dropout_p=0.3, seed=9, backend=backend
        )  # type: ignore[call-overload, arg-type, unused-ignore]
        second.mul_(2)
        return first.add_(1) + second

    tensors = lora_inputs()
    right = {function: gradients(function, *tensors) for function in (ours, dora)}
    found = {}
    for function in (ours, dora):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*tensors)
        found[f"{function.__name__} under autocast"] = worst([y.sum()], right[function][:1])
    with torch.autocast("cpu", torch.bfloat16):
        found["backward under autocast"] = worst(gradients(ours, *tensors), right[ours])
    for reentrant in (False, True):
        saved = gradients(lambda *given, e=reentrant: checkpoint(ours, *given, use_reentrant=e), *tensors)
        found[f"checkpoint, {reentrant}"] = worst(saved, right[ours])
    changed = gradients(lambda *given: ours(*given).mul_(3), *tensors)
    found["in place"] = worst(changed, [3 * tensor for tensor in right[ours]])
    group = gradients(joined, *tensors)
    found["a group in place"] = worst(group[1:], [3 * tensor for tensor in right[ours][1:]])
    return found


@pytest.mark.parametrize("backend", LORA_BACKENDS)
def test_lora_is_right_however_its_graph_is_used(backend, interpreter):
    found = here_or(interpreter, lora_in_graphs, backend)
    assert {name: value for name, value in found.items() if not value <= LIMIT} == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it leaves out of its graphs
def test_torch_compile_around_both_changes_no_gradient():
    hidden, unembed, labels = loss_inputs()

    def model(h: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = lora_linear(h.relu(), torch.eye(D), a, b, 0.7, dropout_p=0.3, seed=9)
        return linear_cross_entropy(y * 2, w, labels) / 3

    tensors = hidden, unembed, torch.ones(4, D) / D, torch.ones(D, 4) / 4
    compiled = torch.compile(model, backend="aot_eager")
    assert worst(gradients(compiled, *tensors), gradients(model, *tensors)) <= LIMIT


ARITHMETIC = (torch.ops.aten.mul, torch.ops.aten.mul_, torch.ops.aten.div, torch.ops.aten.div_, torch.ops.aten.add)


class RoundedFactors(TorchDispatchMode):
    """Notes each operation of a 16-bit tensor and a wider number in a tensor of no dimensions: torch's rules of
    promotion give the result 16 bits, and on a GPU the number is rounded to them first (1/3 by 0.2 %).
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [it for it in args if isinstance(it, torch.Tensor) and it.is_floating_point()]
        narrow = any(it.dtype.itemsize == 2 and it.ndim for it in tensors)
        if (
            narrow
            and any(it.dtype.itemsize > 2 and not it.ndim for it in tensors)
            and func.overloadpacket in ARITHMETIC
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_factor_of_the_loss_is_rounded_to_16_bits(reduction: str, dtype: torch.dtype) -> None:
    hidden, unembed, labels = loss_inputs(dtype)
    bias, weights = torch.randn(V).to(dtype).requires_grad_(), torch.full((T,), 1e-6)
    with RoundedFactors() as factors:
        loss = linear_cross_entropy(
            hidden.requires_grad_(),
            unembed.requires_grad_(),
            labels,
            bias_V=bias,
            weights_T=weights,
            reduction=reduction,
        )
        loss.sum().backward(torch.tensor(1 / 3))
    assert factors.found == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_factor_of_lora_is_rounded_to_16_bits(dtype: torch.dtype) -> None:
    lots = torch.Generator().manual_seed(5)
    x, weight, a, b = (torch.randn(*shape, generator=lots).to(dtype) for shape in ((6, 8), (5, 8), (2, 8), (5, 2)))
    magnitude = (torch.rand(5, generator=lots) + 0.5).to(dtype)
    with RoundedFactors() as factors:
        lora_linear(*(it.requires_grad_() for it in (x, weight, a, b)), 1 / 3, dropout_p=0.1, seed=1).sum().backward()
        dora_linear(*(it.requires_grad_() for it in (x, weight, a, b, magnitude)), 1 / 3).sum().backward()
    assert factors.found == []
