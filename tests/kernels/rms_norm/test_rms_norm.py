"""rms_norm against its formula in float64: forms, layouts, gradients, back ends; the Triton one is interpreted."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.kernels.rms_norm.rms_norm import rms_norm

LIMIT = 2e-6  # relative norm, float32
BACKENDS = ("torch", "triton")
SHAPES = {
    "two": [1, 2],
    "odd": [3, 7],
    "whole tiles": [16, 64],
    "primes over a tile": [37, 101],
    "leading dims": [2, 3, 5, 33],
    "a vector": [9],
    "no rows": [0, 6],
    "many rows": [150, 19],
}


def tensors(shape: list[int], scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, dy, float32."""
    lots = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(shape, generator=lots) for _ in range(2))
    return x * scale, 1 + torch.randn(shape[-1:], generator=lots) / 2, dy


def textbook(x: torch.Tensor, weight: torch.Tensor, eps: float, one_plus: bool) -> torch.Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * (1 + weight if one_plus else weight)


def errors(backend: Any, shape: list[int], scale: float = 1.0, one_plus: bool = False) -> dict[str, float]:
    """Relative norms of the errors of y, dx and dweight."""
    x, weight, dy = tensors(shape, scale)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    y = rms_norm(leaves[0], leaves[1], 1e-6, one_plus=one_plus, backend=backend)
    right = textbook(*exact, 1e-6, one_plus)  # type: ignore[misc,arg-type]
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    wanted = [right.detach(), *torch.autograd.grad(right, exact, dy.double())]
    assert [it.shape for it in found] == [it.shape for it in wanted]
    return {
        name: float((a.double() - b).norm() / (b.norm() or 1))
        for name, a, b in zip(("y", "dx", "dweight"), found, wanted, strict=True)
    }


def here_or(interpreter: Any, function: Any, backend: str, **arguments: Any) -> Any:
    if backend == "torch":
        return function(backend=backend, **arguments)
    return interpreter.run(function, backend=backend, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_float64s(shape, one_plus, backend, interpreter, record_property):
    found = here_or(interpreter, errors, backend, shape=SHAPES[shape], one_plus=one_plus)
    record_property("max_rel_err", max(found.values()))
    assert max(found.values()) < LIMIT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-4, 1e4])  # at 1e-4, eps outweighs the mean square
def test_tiny_and_large_rows_are_float64s(scale, backend, interpreter):
    found = here_or(interpreter, errors, backend, shape=[5, 48], scale=scale)
    assert max(found.values()) < LIMIT


def rounded(backend: Any, round_first: bool) -> bool:
    """Whether the result in float16 is that of the formula with these roundings, but for a few ties."""
    x, weight, _ = (tensor.half() for tensor in tensors([64, 32]))
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed.half().double() if round_first else normed
    right = (normed * weight.double()).half()
    found = rms_norm(x, weight, 1e-6, round_first=round_first, backend=backend)
    return float((found == right).float().mean()) > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("round_first", [False, True])
def test_16_bits_are_rounded_where_the_model_rounds_them(round_first, backend, interpreter):
    assert here_or(interpreter, rounded, backend, round_first=round_first)


def other_layouts(backend: Any) -> bool:
    """Heads first, a slice, one number expanded, features across: the same numbers, and a dense layout stays."""
    base, weight, _ = tensors([2, 5, 16, 16])
    layouts = [base.transpose(1, 2), base.permute(2, 0, 1, 3), base[:, 1:], base[..., :1].expand(-1, -1, -1, 16)]
    for x in (*layouts, base.transpose(2, 3)):
        results = []
        for given in (x, x.contiguous()):
            leaf = given.detach().requires_grad_()
            y = rms_norm(leaf, weight, 1e-6, backend=backend)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), [leaf])))
        for one, other in zip(*results, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)
        assert results[0][0].stride() == x.stride() or x is not layouts[0]
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_in_any_order(backend, interpreter):
    assert here_or(interpreter, other_layouts, backend)


def frozen(backend: Any) -> list[bool]:
    """With a frozen weight: no gradient of it, the same dx, and x and a number a row are all that is kept."""
    x, weight, dy = tensors([24, 40])
    kept: list[torch.Tensor] = []
    x.requires_grad_()
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = rms_norm(x, weight, 1e-6, backend=backend)
    (dx,) = torch.autograd.grad(y, [x], dy)
    weight.requires_grad_()
    y = rms_norm(x, weight, 1e-6, backend=backend)
    same, _ = torch.autograd.grad(y, [x, weight], dy)
    return [torch.equal(dx, same), sorted(tensor.numel() for tensor in kept) == [24, 40, 24 * 40]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_weight_changes_nothing_and_little_is_kept(backend, interpreter):
    assert here_or(interpreter, frozen, backend) == [True, True]


def repeated(backend: Any) -> bool:
    """Two passes, bit for bit."""
    x, weight, dy = tensors([150, 40])
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    one, other = (torch.autograd.grad(rms_norm(*leaves, 1e-6, backend=backend), leaves, dy) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_to_the_last_bit(backend, interpreter):
    assert here_or(interpreter, repeated, backend)


def test_what_does_not_fit_is_refused():
    x, weight, _ = tensors([3, 8])
    with pytest.raises(ValueError, match=r"weight_D is torch.float32 \[7\] on cpu, and x is torch.float32 \[3, 8\]"):
        rms_norm(x, weight[:7], 1e-6)
    with pytest.raises(ValueError, match=r"must be \[D\], of the dtype"):
        rms_norm(x.half(), weight, 1e-6)
    with pytest.raises(ValueError, match="backend=triton cannot run here: there is no GPU"):
        rms_norm(x, weight, 1e-6, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' is not auto, triton or torch"):
        rms_norm(x, weight, 1e-6, backend="cuda")  # type: ignore[arg-type]
