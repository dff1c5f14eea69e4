"""A back end of linear_cross_entropy over all rows, chunk by chunk. N kept rows, D hidden."""

from itertools import accumulate

import torch

from tunesmith.kernels.lce.backends import choose_backend
from tunesmith.kernels.lce.head import Head, Rows


def over_chunks(
    head: Head, hidden_ND: torch.Tensor, labels_N: torch.Tensor, coefficient_N: torch.Tensor, backend: str
) -> tuple[Rows, torch.Tensor | None]:
    """All rows, with grad_hidden in the dtype of hidden_ND; and the number, [], that gradients are in units of, or None
    for 1. The head's gradients add up in the head.
    """
    chosen = choose_backend(backend, head, hidden_ND)
    if chosen.name == "torch" and hidden_ND.device.type == "cpu":
        head.widen()
    unit = _unit(coefficient_N, hidden_ND.dtype) if head.wants_gradient else None
    coefficient_N = coefficient_N if unit is None else coefficient_N / unit
    grad_hidden = torch.empty_like(hidden_ND) if head.wants_hidden else None
    done: list[Rows] = []
    head.most_rows = max(chosen.sizes, default=0)
    for end, size in zip(accumulate(chosen.sizes), chosen.sizes, strict=True):
        part = slice(end - size, end)
        rows = chosen.chunk(head, hidden_ND[part], labels_N[part], coefficient_N[part])
        if grad_hidden is not None and rows.grad_hidden is not None:
            grad_hidden[part] = rows.grad_hidden
            rows.grad_hidden = None
        head.is_first = False
        done.append(rows)
    if head.is_first and head.grad_unembed is not None:
        head.grad_unembed.zero_()  # there was no row at all

    def joined(name: str) -> torch.Tensor:
        return torch.cat([coefficient_N.new_empty(0), *(getattr(rows, name) for rows in done)])

    whole = Rows(joined("nll"), grad_hidden=grad_hidden)
    if head.wants_stats:
        whole.entropy, whole.correct = joined("entropy"), joined("correct").bool()
    return whole, unit


def _unit(coefficient_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The largest coefficient, where gradients of logits are stored in float16: of a mean over 1,000 tokens they would
    be below its smallest number, and no loss scale reaches them.
    """
    if dtype != torch.float16 or len(coefficient_N) == 0:
        return None
    largest = coefficient_N.abs().amax()
    return torch.where(largest > 0, largest, 1)
