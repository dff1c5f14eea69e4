"""glu and glu_packed against their formulas in float64: activations, gradients and back ends, Triton interpreted."""

import math
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.kernels.glu.glu import ACTIVATIONS, glu, glu_packed

LIMIT = 1e-6  # relative norm, float32
BACKENDS = ("torch", "triton")
SHAPES = {"one": [1, 1], "odd": [3, 7], "over a tile": [2, 3, 101], "whole tiles": [4, 128], "no rows": [0, 6]}


def tensors(shape: list[int], scale: float = 2.0) -> list[torch.Tensor]:
    """gate, up, dy, float32."""
    lots = torch.Generator().manual_seed(13)
    return [torch.randn(shape, generator=lots) * factor for factor in (scale, 1.0, 1.0)]


def textbook(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu":
        return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up
    return gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2 * up


def errors(backend: Any, shape: list[int], activation: str, packed: bool, scale: float = 2.0) -> list[float]:
    """Relative norms of the errors of y, dgate and dup."""
    gate, up, dy = tensors(shape, scale)
    exact = [tensor.double().requires_grad_() for tensor in (gate, up)]
    right = textbook(exact[0], exact[1], activation)
    leaves = [torch.cat([gate, up], -1)] if packed else [gate, up]
    for leaf in leaves:
        leaf.requires_grad_()
    function: Any = glu_packed if packed else glu
    y = function(*leaves, activation, backend=backend)
    gradients = torch.autograd.grad(y, leaves, dy)
    found = [y.detach(), *(gradients[0].chunk(2, -1) if packed else gradients)]
    wanted = [right.detach(), *torch.autograd.grad(right, exact, dy.double())]
    assert [it.shape for it in found] == [it.shape for it in wanted]
    return [float((a.double() - b).norm() / (b.norm() or 1)) for a, b in zip(found, wanted, strict=True)]


def here_or(interpreter: Any, function: Any, backend: str, **arguments: Any) -> Any:
    if backend == "torch":
        return function(backend=backend, **arguments)
    return interpreter.run(function, backend=backend, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_float64s(shape, activation, packed, backend, interpreter, record_property):
    found = here_or(interpreter, errors, backend, shape=SHAPES[shape], activation=activation, packed=packed)
    record_property("max_rel_err", max(found))
    assert max(found) < LIMIT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-3, 50.0])  # nearly linear; saturated, where exp() overflows
def test_small_and_large_gates_are_float64s(scale, activation, backend, interpreter):
    found = here_or(interpreter, errors, backend, shape=[8, 50], activation=activation, packed=False, scale=scale)
    assert max(found) < LIMIT


def kept_in_16_bits(backend: Any) -> list[bool]:
    """gate and up are kept, and nothing else; float16 is rounded once; a gradient that is expanded is read right."""
    gate, up, _ = (tensor.half() for tensor in tensors([16, 40]))
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = glu(gate.requires_grad_(), up.requires_grad_(), "silu", backend=backend)
    exact = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    right = textbook(exact[0], exact[1], "silu")
    gradients = torch.autograd.grad(y.sum(), [gate, up])
    wanted = torch.autograd.grad(right.sum(), exact)
    return [
        len(kept) == 2 and kept[0] is gate and kept[1] is up,
        float((y == right.half()).float().mean()) > 0.98,
        all(float((a == b.half()).float().mean()) > 0.98 for a, b in zip(gradients, wanted, strict=True)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_and_up_are_all_that_is_kept(backend, interpreter):
    assert here_or(interpreter, kept_in_16_bits, backend) == [True, True, True]


def test_what_does_not_fit_is_refused():
    gate, up, _ = tensors([3, 8])
    with pytest.raises(ValueError, match="they must be alike"):
        glu(gate, up[:2], "silu")
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, gelu, not 'relu'"):
        glu(gate, up, "relu")
    with pytest.raises(ValueError, match="gate_up has 7 features, which are no two halves"):
        glu_packed(gate[:, :7], "silu")
