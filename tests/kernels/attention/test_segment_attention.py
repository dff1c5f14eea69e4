"""Attention inside segments against the formula over a whole mask, in float64 and in the formats of a run."""

import math
from typing import Any

import pytest
import torch

from tunesmith.kernels.attention import flash, flex
from tunesmith.kernels.attention.segment_attention import reference
from tunesmith.kernels.attention.segment_attention import segment_attention as attend
from tunesmith.kernels.attention.segments import Segments

ROWS = [[5, 1, 7, 11], [24], [20, 4], [1] * 24]  # of every kind: one, alike, a whole row, tokens alone
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "window of two": {"window": 2},
    "window beyond all": {"window": 24},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 4},
    "all": {"sinks": True, "window": 3, "softcap": 1.5},
}


def inputs(
    rows: list[list[int]], heads: int, groups: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor, Segments]:
    """Query, key and value of transformers' layout, sinks, and the segments."""
    generator = torch.Generator(device).manual_seed(1)
    segments = Segments.of_rows(rows, device)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    tensors = [drawn(*segments.shape, number, width).transpose(1, 2) for number in (heads, groups, groups)]
    return [tensor.requires_grad_() for tensor in tensors], drawn(heads).requires_grad_(), segments


def errors(
    dtype: torch.dtype, sizes: tuple[int, int, int], variant: dict[str, Any], device: str = "cpu"
) -> list[float]:
    """Relative errors of the output and of each gradient, against the formula in float64."""
    settings = {"scale": 0.3, **variant}
    tensors, sinks, segments = inputs(ROWS, *sizes, dtype, device)
    leaves = [*tensors, sinks] if settings.pop("sinks", False) else tensors
    out = attend(*tensors, segments, **settings, sinks_H=leaves[3] if len(leaves) > 3 else None)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_sinks = exact_leaves[3] if len(leaves) > 3 else None
    exact = reference(*exact_leaves[:3], segments, **settings, sinks_H=exact_sinks)
    dout = torch.randn(exact.shape, generator=torch.Generator(device).manual_seed(2), device=device).to(dtype)
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    right = [exact.detach(), *torch.autograd.grad(exact, exact_leaves, dout.double())]
    assert all(one.dtype == dtype for one in found)
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, right, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(4, 4, 8), (6, 2, 16), (1, 1, 1), (8, 1, 24)])
def test_output_and_gradients_are_those_of_the_formula(sizes: tuple[int, int, int], variant: str) -> None:
    assert max(errors(torch.float64, sizes, VARIANTS[variant])) < 1e-14


@pytest.mark.parametrize("variant", VARIANTS)
# Two roundings of inputs or outputs and of the weights between them, rms 2^-9 (bfloat16) or 2^-12 each.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
def test_in_the_formats_of_a_run_only_rounding_is_between(dtype: torch.dtype, limit: float, variant: str) -> None:
    assert max(errors(dtype, (6, 2, 16), VARIANTS[variant])) < limit


def test_a_record_does_not_see_another_in_forward_or_backward() -> None:
    tensors, _, segments = inputs([[5, 1, 7, 11]], 2, 1, 8, torch.float32)
    out = attend(*tensors, segments)
    with torch.no_grad():
        moved = [tensor.clone() for tensor in tensors]
        for tensor in moved:
            tensor[:, :, 6:13] += 1
        assert torch.equal(attend(*moved, segments)[:, :6], out[:, :6])
        assert torch.equal(attend(*moved, segments)[:, 13:], out[:, 13:])
    for grad in torch.autograd.grad(out[:, 6:13].sum(), tensors):
        assert grad[:, :, 6:13].abs().sum() > 0
        assert grad[:, :, :6].abs().sum() == grad[:, :, 13:].abs().sum() == 0


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    tensors, _, segments = inputs([[24]], 2, 2, 8, torch.float64)
    exact = attend(*tensors, segments, scale=0.3)
    torch.manual_seed(3)
    drawn = torch.stack([attend(*tensors, segments, scale=0.3, dropout_p=0.25) for _ in range(2000)])
    deviation = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - exact).abs() < 6 * deviation + 1e-12).all()
    assert (drawn[:, 0, 0, 0].abs().sum(-1) == 0).double().mean() == pytest.approx(0.25, abs=0.05)  # one weight there


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same() -> None:
    """Uncompiled, which needs no GPU; a GPU takes it for soft caps."""
    given, _, segments = inputs(ROWS, 4, 2, 16, torch.float32)
    tensors = [tensor.detach() for tensor in given]  # it has no backward on a CPU
    settings: dict[str, Any] = {"scale": 0.3, "window": 4, "softcap": 1.5}
    out = flex.attend(*tensors, segments, **settings)
    exact = reference(*[tensor.double() for tensor in tensors], segments, **settings)
    assert (out - exact).norm() / exact.norm() < 1e-6


def test_the_cuda_kernels_are_called_by_a_signature_that_torch_has() -> None:
    """On meta tensors, whose shapes torch works out: of the arguments every torch since 2.10 has the same."""
    tensors, _, segments = inputs(ROWS, 6, 2, 16, torch.bfloat16)
    query, key, value = (tensor.detach().transpose(1, 2).flatten(0, 1).to("meta") for tensor in tensors)
    on_meta = segments.with_cu_seqlens(segments.cu_seqlens.to("meta"))
    for window in (None, 4):
        call = flash._Call(on_meta, 0.3, window, 0.0)
        bounds = (*call.bounds, 0.0, window is None, False)
        out, lse, *rest = flash._cuda(query, key, value, *bounds, scale=0.3, **call.windows)
        assert (out.shape, lse.shape) == (query.shape, (6, 96))
        grads = flash._backward_on_cuda(out, query, key, value, out, lse, *rest[:2], call=call)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


def test_nothing_as_wide_as_a_sequence_squared_is_made() -> None:
    """Of 24 records of 64 tokens: the largest tensor of forward and backward is one of the inputs."""
    tensors, _, segments = inputs([[64] * 24], 4, 2, 16, torch.float32)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for it in result if isinstance(result, tuple | list) else [result]:
                largest = max(largest, it.numel() if isinstance(it, torch.Tensor) else 0)
            return result

    with Sizes():
        attend(*tensors, segments).sum().backward()
    assert largest == tensors[0].numel()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[:, :, :20], k, v), r"segments are of 1 sequences of 24 tokens"),
        (lambda q, k, v: (q, k[:, :, :20], v), r"keys and values must be of the tokens of the queries"),
        (lambda q, k, v: (q, k[..., :4], v), r"widths must be alike"),
        (lambda q, k, v: (q[:, :3], k, v), r"a multiple of those of keys"),
        (lambda q, k, v: (q, k.double(), v), r"key torch.float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, words: str) -> None:
    tensors, _, segments = inputs([[24]], 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=words):
        attend(*change(*tensors), segments)


def test_sinks_of_other_heads_are_refused() -> None:
    tensors, sinks, segments = inputs([[24]], 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=r"sinks \[3\] for 4 heads"):
        attend(*tensors, segments, sinks_H=sinks[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("sizes", [(6, 2, 16), (8, 1, 128), (4, 4, 20)])
def test_on_a_gpu_only_rounding_is_between(
    sizes: tuple[int, int, int], dtype: torch.dtype, limit: float, variant: str
) -> None:
    assert max(errors(dtype, sizes, VARIANTS[variant], "cuda")) < limit


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device() -> None:
    tensors, _, segments = inputs(ROWS, 6, 2, 16, torch.bfloat16, "cuda")
    attend(*tensors, segments).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*tensors, segments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
