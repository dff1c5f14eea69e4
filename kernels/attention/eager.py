"""Attention by the scores of each group of segments, held whole: soft caps, and what has no flash kernel."""

import torch

from tunesmith.kernels.attention.segments import Segments


def attend(
    query_BHSK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSE: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """[B, S, H, E]. See segment_attention()."""
    heads = query_BHSK.shape[1]
    repeats = heads // key_BGSK.shape[1]
    query, key, value = (it.transpose(1, 2).flatten(0, 1) for it in (query_BHSK, key_BGSK, value_BGSE))
    outs = []
    for group in segments.groups:
        place = torch.arange(group.length, device=query.device)
        seen = place[:, None] >= place
        if window is not None:
            seen &= place[:, None] - place < window
        sizes = group.num_segments, group.length
        q, k, v = (it[group.rows].unflatten(0, sizes).transpose(1, 2) for it in (query, key, value))
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = weigh(q, k, v, seen, scale=scale, softcap=softcap, sinks_H=sinks_H, dropout_p=dropout_p)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[segments.places].unflatten(0, segments.shape)


def weigh(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """[N, H, L, E] of query and key [N, H, L, K] and value [N, H, L, E]: softmax over the keys that are seen.

    Scores are in float32 (float64 for float64), as flash attention has them.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query @ key.transpose(-1, -2)).to(wide)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks_H is None:
        weights = scores.softmax(-1)
    else:
        sinks = sinks_H.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return torch.dropout(weights, dropout_p, train=dropout_p > 0).to(value.dtype) @ value
