"""Attention inside segments by flash attention: nothing of the scores is kept, only each row's log of its sum.

torch's own operations are called below its autograd, for two reasons. torch.nn.attention.varlen.varlen_attn has another
signature in 2.10, 2.11 and 2.13, the operations under it have one; and with them a sink costs no pass over the scores.
A sink only adds to the sum of a row: forward, out shrinks by exp(lse - lse'), with lse' = log(exp(lse) + exp(sink));
backward, the kernels rebuild each weight as exp(score - lse'), which is the weight beside the sink, so lse' and the
smaller out are all that they need. The gradient of the sink is -exp(sink - lse') * (dout . out), summed over rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from tunesmith.kernels.attention.installed import activate_flash_attention_3, leave_flash_attention_3
from tunesmith.kernels.attention.segments import Group, Segments
from tunesmith.kernels.device import is_ampere, on_its_device

MAX_HEAD_WIDTH = 256  # of the CUDA kernels
WIDTH_MULTIPLE = 8  # of the CUDA kernels: widths are padded to one

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda = torch.ops.aten._flash_attention_forward
_cuda_backward = torch.ops.aten._flash_attention_backward

Saved = tuple[torch.Tensor, ...]


def takes(query: torch.Tensor, value: torch.Tensor, dropout_p: float) -> bool:
    """Whether there are kernels for such tensors."""
    if query.device.type == "cpu":
        return query.shape[-1] == value.shape[-1] and not dropout_p
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_WIDTH:
        return False
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_meta or (query.is_cuda and is_16_bit and is_ampere(query.device))


def attend(
    query_BHSK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSE: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    sinks_H: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """[B, S, H, E]. See segment_attention(); only where takes() says so, and without a soft cap."""
    out_width, tensors = value_BGSE.shape[-1], [query_BHSK, key_BGSK, value_BGSE]
    if query_BHSK.device.type != "cpu":
        width = max(query_BHSK.shape[-1], out_width)
        width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        tensors = [it if it.shape[-1] == width else pad(it, (0, width - it.shape[-1])) for it in tensors]
    query, key, value = (it.transpose(1, 2).flatten(0, 1) for it in tensors)
    query = query.contiguous()  # out is laid out alike, and is read as [T, H * K]: else it would be kept twice
    out: torch.Tensor = _Flash.apply(query, key, value, sinks_H, _Call(segments, scale, window, dropout_p))
    return out[..., :out_width].unflatten(0, segments.shape)


@dataclass(frozen=True)
class _Call:
    """What is no tensor of a graph."""

    segments: Segments
    scale: float
    window: int | None
    dropout_p: float

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        longest = self.segments.max_length
        return self.segments.cu_seqlens, self.segments.cu_seqlens, longest, longest

    @property
    def windows(self) -> dict[str, int]:
        """Tokens that one sees on its left, without itself, and on its right; -1: all. As varlen_attn says it."""
        return {"window_size_left": -1 if self.window is None else self.window - 1, "window_size_right": 0}


class _Flash(torch.autograd.Function):
    """Of [T, H, K], [T, G, K] and [T, G, K]: [T, H, K]. lse is [H, T] float32, as the CUDA kernels have it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        call: _Call,
    ) -> torch.Tensor:
        forward = _on_cpu if query.device.type == "cpu" else _on_cuda
        with on_its_device(query.device):
            out, lse, *rest = forward(query, key, value, call)
        if sinks is not None:
            with_sink = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
            out = out * (lse - with_sink).exp().t()[..., None].to(out.dtype)
            lse = with_sink
        ctx.save_for_backward(query, key, value, out, lse, sinks, *rest)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse, sinks, *rest = ctx.saved_tensors
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = (sinks[:, None].to(lse.dtype) - lse).exp()  # [H, T]: of the sink in each softmax
            dsinks = -(share * (dout.to(lse.dtype) * out).sum(-1).t()).sum(1).to(sinks.dtype)
        backward = _backward_on_cpu if query.device.type == "cpu" else _backward_on_cuda
        with on_its_device(query.device):
            grads = backward(dout.contiguous(), query, key, value, out, lse, *rest, call=ctx.call)
        return *grads, dsinks, None


def _on_cuda(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call) -> Saved:
    """All segments in one launch. Of meta tensors too, which shows what is kept for a backward."""
    if query.is_cuda and call.dropout_p:  # which FlashAttention 3 does not have
        leave_flash_attention_3()
    elif query.is_cuda:
        activate_flash_attention_3(query.device)
    out, lse, rng_state, unused, _ = _cuda(
        query, key, value, *call.bounds, call.dropout_p, call.window is None, False, scale=call.scale, **call.windows
    )
    return out, lse, rng_state, unused


def _backward_on_cuda(*tensors: torch.Tensor, call: _Call) -> Saved:
    """tensors: dout, query, key, value, out, lse, and what the generator's state was."""
    *inputs, rng_state, unused = tensors
    grads: Saved = _cuda_backward(
        *inputs, *call.bounds, call.dropout_p, call.window is None, rng_state, unused, scale=call.scale, **call.windows
    )
    return grads


def _on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call) -> Saved:
    """A group of segments at a time, as a batch; tokens are gathered into places and back."""
    outs, lses = [], []
    for group in call.segments.groups:
        inputs = [_gathered(it, group) for it in (query, key, value)]
        out, lse = _cpu(*inputs, 0.0, True, attn_mask=_band(group, call.window, query), scale=call.scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    return _scattered(outs, call.segments), _scattered(lses, call.segments).t()


def _backward_on_cpu(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    call: _Call,
) -> Saved:
    grads: tuple[list[torch.Tensor], ...] = ([], [], [])
    for group in call.segments.groups:
        douts = dout.index_select(0, group.rows).index_fill_(0, group.repeated, 0.0)  # nobody reads a repetition
        found = _cpu_backward(
            douts.unflatten(0, (group.num_segments, group.length)).transpose(1, 2),
            *(_gathered(it, group) for it in (query, key, value, out, lse.t())),
            0.0, True, attn_mask=_band(group, call.window, query), scale=call.scale,
        )  # fmt: skip
        for grad, parts in zip(found, grads, strict=True):
            parts.append(grad.transpose(1, 2).flatten(0, 1))
    return tuple(_scattered(parts, call.segments) for parts in grads)


def _gathered(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[T, H, ...] -> [N, H, L, ...] of a group."""
    return tensor.index_select(0, group.rows).unflatten(0, (group.num_segments, group.length)).transpose(1, 2)


def _scattered(parts: list[torch.Tensor], segments: Segments) -> torch.Tensor:
    """What each group has in its places, [N * L, ...], back in the order of the tokens, [T, ...]."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, segments.places)


def _band(group: Group, window: int | None, query: torch.Tensor) -> torch.Tensor | None:
    """[1, 1, L, L], -inf for what lies before the window; None where all of a group lies inside."""
    if window is None or window >= group.length:
        return None
    size = (group.length, group.length)
    return torch.full(size, -torch.inf, dtype=query.dtype, device=query.device).tril(-window)[None, None]
