"""rope against its formula in float64: layouts, gradients and back ends; the Triton one in the interpreter."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.kernels.rope.rope import rope

LIMIT = 4e-7  # relative norm, float32: two products and a sum
BACKENDS = ("torch", "triton")
CASES: dict[str, dict[str, Any]] = {
    "one": {"B": 1, "H": 1, "G": 1, "T": 1, "K": 2},
    "odd": {"B": 2, "H": 3, "G": 1, "T": 5, "K": 6},
    "whole tiles": {"B": 1, "H": 4, "G": 2, "T": 3, "K": 16},
    "one angle for all": {"B": 3, "H": 5, "G": 5, "T": 2, "K": 14, "angles": 1},
}


def tensors(B: int, H: int, G: int, T: int, K: int, angles: int = 0) -> list[torch.Tensor]:
    """q and k as transformers passes them, views of [B, T, H, K]; cos and sin that no angle has; dq and dk."""
    lots = torch.Generator().manual_seed(11)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=lots)

    q, k = drawn(B, T, H, K).transpose(1, 2), drawn(B, T, G, K).transpose(1, 2)
    return [q, k, drawn(angles or B, T, K), drawn(angles or B, T, K), drawn(B, H, T, K), drawn(B, G, T, K)]


def textbook(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def errors(backend: Any, case: dict[str, Any]) -> list[float]:
    """Relative norms of the errors of q, k, dq and dk."""
    q, k, cos, sin, *upstream = tensors(**case)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    outputs = rope(q, k, cos, sin, backend=backend)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = [textbook(leaf, cos.double(), sin.double()) for leaf in exact]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    assert all(it.detach().transpose(1, 2).is_contiguous() for it in found)  # as projections make and take them
    wanted = [*right, *torch.autograd.grad(right, exact, [d.double() for d in upstream])]
    return [float((a.double() - b).norm().detach() / b.detach().norm()) for a, b in zip(found, wanted, strict=True)]


def here_or(interpreter: Any, function: Any, backend: str, **arguments: Any) -> Any:
    if backend == "torch":
        return function(backend=backend, **arguments)
    return interpreter.run(function, backend=backend, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_float64s(case, backend, interpreter, record_property):
    found = here_or(interpreter, errors, backend, case=CASES[case])
    record_property("max_rel_err", max(found))
    assert max(found) < LIMIT


def kept_and_wide(backend: Any) -> list[bool]:
    """Only cos and sin are kept; strided angles and expanded gradients are read right; float16 is rounded once."""
    q, k, cos, sin, dq, dk = tensors(2, 3, 2, 5, 8)
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        outputs = rope(q.requires_grad_(), k.requires_grad_(), cos, sin, backend=backend)
    right = torch.autograd.grad(outputs, [q, k], [dq[..., :1].repeat(1, 1, 1, 8), dk])
    strided = rope(q, k, cos.transpose(0, 1).contiguous().transpose(0, 1), sin, backend=backend)
    found = torch.autograd.grad(strided, [q, k], [dq[..., :1].expand(-1, -1, -1, 8), dk])
    halves = [tensor.detach().half() for tensor in (q, k)]
    once = [textbook(half.double(), cos.double(), sin.double()).half() for half in halves]
    rotated = rope(halves[0], halves[1], cos, sin, backend=backend)
    return [
        len(kept) == 2 and kept[0] is cos and kept[1] is sin,
        all(torch.equal(a, b) for a, b in zip(found, right, strict=True)),
        all(float((a == b).float().mean()) > 0.99 for a, b in zip(rotated, once, strict=True)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_angles_are_kept_and_16_bits_are_rounded_once(backend, interpreter):
    assert here_or(interpreter, kept_and_wide, backend) == [True, True, True]


def test_what_does_not_fit_is_refused():
    q, k, cos, sin, *_ = tensors(2, 3, 2, 5, 8)
    for wrong in ((q, k, cos[..., :4], sin[..., :4]), (q, k[:1], cos, sin), (q.half(), k, cos, sin)):
        with pytest.raises(ValueError, match="they do not fit each other"):
            rope(*wrong)
