"""A back end of linear_cross_entropy over all rows, chunk by chunk. N kept rows, D hidden."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.kernels.lce.backends import plan_for
from tunesmith.kernels.lce.head import Head
from tunesmith.kernels.lce.rows import Rows


@dataclass
class Found:
    """What all chunks came to, [N] each, and [N, D] in the dtype of the hidden states."""

    loss: torch.Tensor
    logprob: torch.Tensor | None
    entropy: torch.Tensor | None
    correct: torch.Tensor | None
    grad_hidden: torch.Tensor | None
    unit: torch.Tensor | None  # [], what this and the head's gradients are in units of; None: 1


def _unit(coefficient_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The largest coefficient, where gradients of logits are stored in float16: of a mean over 1,000 tokens they would
    be below its smallest number, and no loss scale reaches them.
    """
    if dtype != torch.float16 or len(coefficient_N) == 0:
        return None
    largest = coefficient_N.abs().amax()
    return torch.where(largest > 0, largest, 1)


def over_chunks(
    head: Head,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    coefficient_N: torch.Tensor,
    backend: str,
    max_slab_bytes: int | None,
) -> Found:
    """Runs the back end over all rows; the head's gradients add up in the head."""
    plan = plan_for(backend, head, hidden_ND, max_slab_bytes)
    if plan.backend == "torch" and hidden_ND.device.type == "cpu":
        head.widen()
    unit = _unit(coefficient_N, hidden_ND.dtype) if head.wants_gradient else None
    coefficient_N = coefficient_N if unit is None else coefficient_N / unit
    grad_hidden = torch.empty_like(hidden_ND) if head.wants_hidden else None
    done: list[Rows] = []
    for start in range(0, len(hidden_ND), plan.rows):
        part = slice(start, start + plan.rows)
        rows = plan.chunk(head, hidden_ND[part], labels_N[part], coefficient_N[part])
        if grad_hidden is not None and rows.grad_hidden is not None:
            grad_hidden[part] = rows.grad_hidden
            rows.grad_hidden = None
        head.is_first = False
        done.append(rows)
    head.finish()
    joined = _joined(done, coefficient_N)
    return Found(
        loss=joined(lambda rows: rows.loss),
        logprob=-joined(lambda rows: rows.nll) if head.wants_stats else None,
        entropy=joined(lambda rows: rows.entropy) if head.wants_stats else None,
        correct=joined(lambda rows: rows.correct).bool() if head.wants_stats else None,
        grad_hidden=grad_hidden,
        unit=unit,
    )


def _joined(done: list[Rows], like_N: torch.Tensor) -> Callable[[Callable[[Rows], Any]], torch.Tensor]:
    """joined(part) is that part of all chunks, [N]."""
    return lambda part: torch.cat([part(rows) for rows in done]) if done else like_N.new_empty(0)
