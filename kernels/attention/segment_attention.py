"""Causal attention of packed records, each for itself, without a mask over the whole sequence.

    scores[i, j] = scale * query[i] . key[j]        softcap: cap * tanh(scores / cap)
    out[i]       = sum_j exp(scores[i, j]) value[j] / (sum_j exp(scores[i, j]) + exp(sink))

over the tokens j <= i of i's segment, of which a sliding window keeps the last `window`. Query head h reads key head
h // (H / G): keys are never repeated. The work grows with the sum of squares of the segments' lengths, not with S^2.
Letters: B sequences, S tokens of one, H query heads, G key heads, K and E their width and that of the values.
"""

import torch

from tunesmith.kernels.attention import eager, flash, flex, installed
from tunesmith.kernels.attention.segments import Segments


def segment_attention(
    query_BHSK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSE: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention inside each segment, [B, S, H, E], in the dtype of query; differentiable.

    Args:
        query_BHSK: [B, H, S, K], any strides; memory laid out as [B, S, H, K] is read as it lies.
        key_BGSK, value_BGSE: [B, G, S, K] and [B, G, S, E]; H is a multiple of G.
        segments: of the B * S tokens, on the device of query.
        scale: of the scores; None: K ** -0.5.
        window: tokens that one sees, itself included; None: all before it in its segment.
        softcap: None: scores as they are.
        sinks_H: [H], a score that takes its share of the softmax and has no value; None: there is none.
        dropout_p: share of the weights that is dropped, drawn from torch's generator of the device.
    Raises: ValueError when shapes, dtypes or devices disagree.
    Source: Dao, 2023, arXiv:2307.08691; sinks: OpenAI, 2025, arXiv:2508.10925.
    """
    _check(query_BHSK, key_BGSK, value_BGSE, segments, sinks_H)
    scale = query_BHSK.shape[-1] ** -0.5 if scale is None else scale
    window = None if window is None or window >= segments.max_length else window
    tensors = query_BHSK, key_BGSK, value_BGSE, segments
    # On meta tensors, which count what is kept, a soft cap counts as on a GPU, where nothing keeps whole scores.
    is_counted = query_BHSK.is_meta and sinks_H is None and not dropout_p
    if (softcap is None or is_counted) and flash.takes(query_BHSK, value_BGSE, dropout_p):
        return flash.attend(*tensors, scale=scale, window=window, sinks_H=sinks_H, dropout_p=dropout_p)
    if softcap is not None and installed.takes(query_BHSK, value_BGSE, sinks_H):
        return installed.attend(*tensors, scale=scale, window=window, softcap=softcap, dropout_p=dropout_p)
    if flex.takes(query_BHSK, sinks_H, dropout_p):
        return flex.attend(*tensors, scale=scale, window=window, softcap=softcap)
    return eager.attend(*tensors, scale=scale, window=window, softcap=softcap, sinks_H=sinks_H, dropout_p=dropout_p)


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, sinks: torch.Tensor | None
) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    batch, tokens = segments.shape
    if query.shape[0] != batch or query.shape[2] != tokens:
        raise ValueError(f"{shapes}: the segments are of {batch} sequences of {tokens} tokens.")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != batch or key.shape[2] != tokens:
        raise ValueError(f"{shapes}: keys and values must be of the tokens of the queries.")
    if query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: widths must be alike, and the heads of queries a multiple of those of keys.")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}.")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks {list(sinks.shape)} for {query.shape[1]} heads.")
    if segments.cu_seqlens.device != query.device:
        raise ValueError(f"segments are on {segments.cu_seqlens.device}, query on {query.device}.")


def reference(
    query_BHSK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSE: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula over a whole [S, S] mask: [B, S, H, E]."""
    groups = query_BHSK.shape[1] // key_BGSK.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_BGSK, value_BGSE))
    place = torch.arange(segments.shape[1], device=query_BHSK.device)
    numbers = segments.numbers[:, None]
    seen = (numbers[..., :, None] == numbers[..., None, :]) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    return eager.weigh(query_BHSK, key, value, seen, scale=scale, softcap=softcap, sinks_H=sinks_H).transpose(1, 2)
