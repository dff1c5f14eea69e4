"""Norms, rotations and gated units on a GPU, in bfloat16 at the sizes of real models: against float64, and repeated.

As test_gpu_kernels.py, which says how to run it on a lent machine. The measure is the error of the exact answer rounded
to bfloat16: a kernel may add 0.25 of it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunesmith.kernels.glu.glu import ACTIVATIONS, glu, glu_packed
from tunesmith.kernels.rms_norm.rms_norm import rms_norm
from tunesmith.kernels.rope.rope import rope

pytestmark = pytest.mark.gpu
ROOM = 1.25
Function = Callable[..., Any]


def drawn(*shape: int) -> torch.Tensor:
    lots = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=lots, device="cuda").bfloat16()


def check(ours: Function, exactly: Function, *tensors: torch.Tensor) -> None:
    """ours(*tensors) on Triton, twice, against the same call in float64 on plain torch, values and gradients."""

    def results(function: Function, given: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [drawn(*output.shape).to(output.dtype) for output in outputs]
        return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    found, again = results(ours, list(tensors)), results(ours, list(tensors))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    exact = results(exactly, [tensor.double() for tensor in tensors])
    for number, (one, right) in enumerate(zip(found, exact, strict=True)):
        rounding = (right.bfloat16().double() - right).norm()
        assert float((one.double() - right).norm() / rounding) < ROOM, f"result {number}"


@pytest.mark.parametrize(("rows", "features"), [(8192, 2048), (8191, 3584), (8192, 4096), (4097, 5120), (512, 8192)])
@pytest.mark.parametrize("one_plus", [False, True])
def test_norms(rows, features, one_plus):
    def norm(backend: str) -> Function:
        return lambda x, weight: rms_norm(x, weight, 1e-6, one_plus=one_plus, backend=backend)

    check(norm("triton"), norm("torch"), drawn(rows, features), drawn(features))


def test_norms_of_heads_as_gemma_and_qwen_lay_them_out():
    q = drawn(2, 4096, 32, 128)

    def norm(backend: str) -> Function:
        return lambda x, weight: rms_norm(x, weight, 1e-6, backend=backend)

    check(norm("triton"), norm("torch"), q, drawn(128))
    check(norm("triton"), norm("torch"), q.transpose(1, 2), drawn(128))


@pytest.mark.parametrize(("heads", "groups", "head_size"), [(32, 8, 128), (28, 4, 128), (32, 8, 64), (16, 8, 256)])
def test_rotations(heads, groups, head_size):
    q, k = (drawn(2, 4096, number, head_size).transpose(1, 2) for number in (heads, groups))
    cos, sin = drawn(2, 1, 4096, head_size).unbind(0)
    check(
        lambda q, k: rope(q, k, cos, sin, backend="triton"), lambda q, k: rope(q, k, cos.double(), sin.double()), q, k
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "features"), [(8192, 14_336), (4099, 8960), (8192, 1001)])
def test_gated_units(rows, features, activation):
    def unit(function: Any, backend: str) -> Function:
        return lambda *given: function(*given, activation, backend=backend)

    check(unit(glu, "triton"), unit(glu, "torch"), drawn(rows, features), drawn(rows, features + 1)[:, 1:])
    check(unit(glu_packed, "triton"), unit(glu_packed, "torch"), drawn(rows, 2 * features))
