"""Attention inside segments by torch's flex_attention: soft caps and float32 on a GPU, where flash attention has none.

Compiled once for a dtype, head width and kind of mask; what a batch's segments are is an argument. Whole scores are
never held.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tunesmith.kernels.attention.segments import Segments

BLOCK = 128  # tokens: flex_attention's own default; blocks without a pair that is seen are left out


def takes(query: torch.Tensor, sinks_H: torch.Tensor | None, dropout_p: float) -> bool:
    """Whether it computes such attention."""
    return query.is_cuda and sinks_H is None and not dropout_p


def attend(
    query_BHSK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSE: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[B, S, H, E]. See segment_attention()."""
    batch, tokens = segments.shape
    create, flex = _operations(query_BHSK.is_cuda)
    device = str(query_BHSK.device)
    block_mask = create(_seen(segments.numbers, window), batch, None, tokens, tokens, device=device, BLOCK_SIZE=BLOCK)
    out: torch.Tensor = flex(
        query_BHSK, key_BGSK, value_BGSE,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=block_mask, scale=scale, enable_gqa=query_BHSK.shape[1] != key_BGSK.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


@cache
def _operations(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """create_block_mask and flex_attention; uncompiled they hold whole scores, which is for tests."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # imports inductor: seconds

    if not compiled:
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask), torch.compile(flex_attention)


def _seen(numbers_BS: torch.Tensor, window: int | None) -> Callable[..., torch.Tensor]:
    def seen(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        together = (numbers_BS[b, i] == numbers_BS[b, j]) & (i >= j)
        return together if window is None else together & (i - j < window)

    return seen


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
