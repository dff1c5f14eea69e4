"""Output head and cross-entropy in one operation, without ever holding the [T, V] logits.

    z[t, v] = softcap(scale * (hidden[t] . unembed[v] + bias[v]))          softcap(x) = cap * tanh(x / cap)
    loss[t] = weights[t] * (logsumexp_v z[t, v] - z[t, labels[t]])

Rows without a label are dropped before the first product. The rest goes in chunks through one of three back ends, all
with the formulas of torch_backend.py: `torch`, `chunked` (cuBLAS, and one Triton kernel a row) and `anchored` (a Triton
product that stores exp(logit - label's logit)). Gradients are computed in the forward, where the logits are; only
reduction="none" with a trainable head computes them again in the backward, because the weight of each row in the head's
gradient is not known before.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tunesmith.kernels.device import DEBUG, on_its_device, without_autocast
from tunesmith.kernels.lce.checks import IGNORE_INDEX, check_labels, check_options, check_rows, check_tensors
from tunesmith.kernels.lce.head import make_head
from tunesmith.kernels.lce.over_chunks import over_chunks


class TokenStats(NamedTuple):
    """What the logits say about each token, [T]; 0 and False where the label is ignored. Without gradients."""

    logprob_T: torch.Tensor  # log-probability of the label, float32, nats
    entropy_T: torch.Tensor  # of the distribution over the vocabulary, float32, nats
    correct_T: torch.Tensor  # bool: no logit is above the label's


@dataclass(frozen=True)
class _Call:
    """What one call computes with, besides tensors."""

    logit_scale: float
    logit_softcap: float | None
    reduction: str
    wants_stats: bool
    wants_gradient: bool  # autograd tells a forward what needs a gradient, but not that it is under no_grad
    backend: str


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    unembed_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    weights_T: torch.Tensor | None = None,
    rows_N: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "sum",
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """The loss of each token, or their sum, by the formulas at the head of this file.

    Args:
        hidden_TD: last hidden states, [T, D], float32, bfloat16 or float16 (float64 with backend torch). It and
            all others but rows_N contiguous.
        unembed_VD: output embedding, [V, D], dtype of hidden_TD.
        labels_T: token ids, or IGNORE_INDEX, [T], int64. Where they are on a GPU, nothing looks for one out of range,
            which would wait for it, unless TUNESMITH_DEBUG=1 is in the environment.
        bias_V: of the head, [V], dtype of hidden_TD.
        weights_T: of each token in the loss, [T], float32; no gradient goes to it.
        rows_N: the rows whose label counts, [N], int64, in any order, each once. Given (a collator knows them), no
            GPU is waited for; left out, they are found by IGNORE_INDEX.
        reduction: "sum" -> one number, "none" -> [T]. Never a mean: what a sum is divided by spans batches and ranks.
        return_stats: also return TokenStats.
        backend: auto (triton on a GPU, else torch), triton (the faster of the two), anchored, chunked or torch. What a
            Triton back end does not cover falls back, and says so once where it was asked for by name.

    Returns: loss in nats, [] or [T], float32 (float64 for float64), 0 where ignored; or with return_stats
        (loss, TokenStats).
    Raises: ValueError when the arguments do not go together; RuntimeError when differentiated twice.
    Source: the chunking is Hsu et al., 2024, arXiv:2410.10989; docs/kernels.md derives the rest.
    """
    check_options(logit_scale, logit_softcap, reduction)
    check_tensors(hidden_TD, unembed_VD, labels_T, bias_V, weights_T, rows_N)
    is_checked = DEBUG or labels_T.device.type == "cpu"
    if rows_N is None:
        kept = labels_T != IGNORE_INDEX
        rows_N = None if labels_T.device.type == "cpu" and bool(kept.all()) else kept.nonzero()[:, 0]
    elif is_checked:
        check_rows(rows_N, len(labels_T))
    labels_N = labels_T if rows_N is None else labels_T[rows_N]
    if is_checked:
        check_labels(labels_N, len(unembed_VD))
    call = _Call(logit_scale, logit_softcap, reduction, return_stats, torch.is_grad_enabled(), backend)
    with without_autocast(hidden_TD.device), on_its_device(hidden_TD.device):
        loss, *stats = _LinearCrossEntropy.apply(hidden_TD, unembed_VD, bias_V, labels_N, weights_T, rows_N, call)
    return (loss, TokenStats(*stats)) if return_stats else loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: losses, and where possible the gradients for an upstream gradient of 1. Backward: scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        unembed_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        weights_T: torch.Tensor | None,
        rows_N: torch.Tensor | None,
        call: _Call,
    ) -> Any:
        wants_hidden, wants_unembed, wants_bias = (call.wants_gradient and it for it in ctx.needs_input_grad[:3])
        ctx.again = call.reduction == "none" and (wants_unembed or wants_bias)
        hidden_ND = hidden_TD if rows_N is None else hidden_TD[rows_N]
        weights_N = _weights(weights_T, rows_N, hidden_ND)
        head = make_head(
            unembed_VD,
            bias_V,
            call.logit_scale,
            call.logit_softcap,
            wants_hidden=wants_hidden and not ctx.again,
            wants_unembed=wants_unembed and not ctx.again,
            wants_bias=wants_bias and not ctx.again,
            wants_stats=call.wants_stats,
        )
        rows, unit = over_chunks(head, hidden_ND, labels_N, weights_N, call.backend)
        ctx.call, ctx.num_tokens = call, len(hidden_TD)
        ctx.dtypes = hidden_TD.dtype, unembed_VD.dtype, None if bias_V is None else bias_V.dtype
        kept = (hidden_TD, unembed_VD, bias_V, labels_N, weights_T) if ctx.again else (None,) * 5
        ctx.save_for_backward(rows_N, unit, rows.grad_hidden, head.grad_unembed, head.grad_bias, *kept)
        loss_N = rows.nll * weights_N
        loss = loss_N.sum() if call.reduction == "sum" else _spread(loss_N, rows_N, ctx.num_tokens)
        if not call.wants_stats:
            return (loss,)
        stats = [_spread(s, rows_N, ctx.num_tokens) for s in (-rows.nll, rows.entropy, rows.correct)]
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has no second derivative: call backward without create_graph=True, or take "
                "torch.nn.functional.cross_entropy of hidden_TD @ unembed_VD.T."
            )
        rows_N, unit, hidden_ND, grad_unembed, grad_bias, *kept = ctx.saved_tensors
        if ctx.again:
            with without_autocast(grad_loss.device):
                return *_again(ctx, rows_N, grad_loss, *kept), None, None, None, None
        grad = grad_loss = grad_loss if unit is None else grad_loss * unit
        if ctx.call.reduction == "none":
            grad = (grad_loss if rows_N is None else grad_loss[rows_N])[:, None]
        hidden_dtype, unembed_dtype, bias_dtype = ctx.dtypes
        return (
            _scaled(hidden_ND, grad, hidden_dtype, rows_N, ctx.num_tokens),
            _scaled(grad_unembed, grad_loss, unembed_dtype),
            _scaled(grad_bias, grad_loss, bias_dtype),
            *(None,) * 4,
        )


def _again(
    ctx: Any,
    rows_N: torch.Tensor | None,
    grad_T: torch.Tensor,
    hidden_TD: torch.Tensor,
    unembed_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    weights_T: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients from the logits computed anew, now that each row's upstream gradient is known."""
    wants_hidden, wants_unembed, wants_bias = ctx.needs_input_grad[:3]
    hidden_ND, grad_N = (hidden_TD, grad_T) if rows_N is None else (hidden_TD[rows_N], grad_T[rows_N])
    head = make_head(
        unembed_VD,
        bias_V,
        ctx.call.logit_scale,
        ctx.call.logit_softcap,
        wants_hidden=wants_hidden,
        wants_unembed=wants_unembed,
        wants_bias=wants_bias,
        wants_stats=False,
    )
    coefficient_N = _weights(weights_T, rows_N, hidden_ND) * grad_N
    rows, unit = over_chunks(head, hidden_ND, labels_N, coefficient_N, ctx.call.backend)
    hidden_dtype, unembed_dtype, bias_dtype = ctx.dtypes
    return (
        _scaled(rows.grad_hidden, unit, hidden_dtype, rows_N, ctx.num_tokens),
        _scaled(head.grad_unembed, unit, unembed_dtype),
        _scaled(head.grad_bias, unit, bias_dtype),
    )


def _weights(weights_T: torch.Tensor | None, rows_N: torch.Tensor | None, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Weights of the kept rows, [N], float32 or wider."""
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    if weights_T is None:
        return torch.ones(len(hidden_ND), dtype=wide, device=hidden_ND.device)
    return (weights_T if rows_N is None else weights_T[rows_N]).to(wide)


def _spread(values_N: torch.Tensor | None, rows_N: torch.Tensor | None, num_tokens: int) -> Any:
    """Values of the kept rows at their places among all, zeros between, [T, ...]."""
    if values_N is None or rows_N is None:
        return values_N
    return values_N.new_zeros(num_tokens, *values_N.shape[1:]).index_copy_(0, rows_N, values_N)


def _scaled(
    gradient: torch.Tensor | None,
    factor: torch.Tensor | None,
    dtype: torch.dtype | None,
    rows_N: torch.Tensor | None = None,
    num_rows: int = 0,
) -> torch.Tensor | None:
    """gradient * factor, multiplied in float32 or wider, rounded once; spread over all rows if some were dropped."""
    if gradient is None:
        return None
    if factor is None:
        return _spread(gradient.to(dtype), rows_N, num_rows)
    scaled = torch.empty_like(gradient, dtype=dtype)
    factor = factor.to(torch.promote_types(gradient.dtype, torch.float32))
    factor = factor if factor.ndim else factor[None]  # a number in no dimension is rounded to the dtype of gradient
    torch.mul(gradient, factor, out=scaled)
    return _spread(scaled, rows_N, num_rows)
