"""Calls of rms_norm, rope and glu on meta tensors, forward and backward, for dry_launches.py: between them they launch
all that is shipped, for bfloat16 and, of the widest, for float32.
"""

from collections.abc import Callable
from functools import partial

import torch

from tunesmith.kernels.glu.glu import ACTIVATIONS, glu, glu_packed
from tunesmith.kernels.rms_norm.rms_norm import rms_norm
from tunesmith.kernels.rope.rope import rope

ROWS = 2048
BF16 = torch.bfloat16
Call = Callable[[], object]


def _empty(*shape: int, dtype: torch.dtype, trained: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)


def dry_norm(features: int, dtype: torch.dtype, *, trained: bool, plain: bool = False, num_rows: int = ROWS) -> None:
    """plain: Llama's; else Gemma's, which has the other options."""
    weight = _empty(features, dtype=dtype, trained=trained)
    y = rms_norm(_empty(num_rows, features, dtype=dtype), weight, 1e-6, one_plus=not plain, round_first=plain)
    y.backward(torch.empty_like(y))


def dry_rope(head_size: int, dtype: torch.dtype, *, heads: int = 32, num_rows: int = ROWS, batch: int = 1) -> None:
    """32 query heads and 8 key heads, as transformers lays them out."""
    q, k = (_empty(batch, num_rows, number, head_size, dtype=dtype).transpose(1, 2) for number in (heads, 8))
    cos, sin = (_empty(batch, num_rows, head_size, dtype=dtype, trained=False) for _ in range(2))
    outputs = rope(q, k, cos, sin)
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def dry_glu(features: int, dtype: torch.dtype, activation: str, *, packed: bool = False, num_rows: int = ROWS) -> None:
    """packed: gate and up in one tensor."""
    if packed:
        y = glu_packed(_empty(num_rows, 2 * features, dtype=dtype), activation)
    else:
        y = glu(_empty(num_rows, features, dtype=dtype), _empty(num_rows, features, dtype=dtype), activation)
    y.backward(torch.empty_like(y))


def norm_calls() -> list[Call]:
    """Every width of a tile, widths that fill none and are no multiple of 16, and both forms."""
    widths = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 33, 4001)
    found: list[Call] = [partial(dry_norm, it, BF16, trained=trained) for it in widths for trained in (False, True)]
    found += [partial(dry_norm, it, torch.float32, trained=True) for it in (128, 8192, 4001)]
    return [*found, partial(dry_norm, 4096, BF16, trained=False, plain=True)]


def rope_calls() -> list[Call]:
    """Heads of a power of two, of 80, and of a few features."""
    return [*(partial(dry_rope, it, BF16) for it in (64, 80, 128, 256, 6)), partial(dry_rope, 256, torch.float32)]


def glu_calls() -> list[Call]:
    """Each activation; features that are a multiple of 16, and not."""
    found: list[Call] = [partial(dry_glu, 14_336, BF16, it) for it in ACTIVATIONS]
    found += [partial(dry_glu, 1001, dtype, "gelu_tanh") for dtype in (BF16, torch.float32)]
    return [*found, *(partial(dry_glu, it, BF16, "silu", packed=True) for it in (14_336, 1001))]


CALLS: dict[str, Callable[[], list[Call]]] = {"rms_norm": norm_calls, "rope": rope_calls, "glu": glu_calls}
