"""Rows whose label is more than 69 nats below another token: right among others, and no head is read for each."""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy

T, D, V = 48, 32, 128  # three tiles of rows under the interpreter, two or four of the vocabulary


def given(lost: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, unembed, labels; the label of a lost row is 90 nats or more below the others."""
    lots = torch.Generator().manual_seed(len(lost))
    hidden, unembed = ((4 * torch.randn(size, D, generator=lots)).round() / 16 for size in (T, V))
    labels = torch.arange(T) % 3  # each of three tokens has a hidden channel of its own
    unembed[:, :3] = torch.eye(V, 3)
    hidden[:, :3] = 0
    hidden[lost, labels[lost]] = -90.0 - torch.arange(len(lost))
    return hidden, unembed, labels


def largest_error(lost: list[int], stats: bool) -> float:
    hidden, unembed, labels = given(lost)
    wide = [tensor.double().requires_grad_() for tensor in (hidden, unembed)]
    logprob = (wide[0] @ wide[1].T).log_softmax(-1)
    exact = -logprob.gather(1, labels[:, None])[:, 0]
    exact.sum().backward()
    leaves = [hidden.requires_grad_(), unembed.requires_grad_()]
    found = linear_cross_entropy(*leaves, labels, reduction="none", return_stats=stats, backend="anchored")
    pairs = []
    if stats:
        found, told = found
        pairs.append((told.entropy_T, -(logprob.exp() * logprob).sum(-1)))
    linear_cross_entropy(*leaves, labels, backend="anchored").backward()
    pairs += [(found, exact), *((leaf.grad, right.grad) for leaf, right in zip(leaves, wide, strict=True))]
    return max(float((mine - right).norm() / right.norm()) for mine, right in pairs)


def head_reads(lost: list[int]) -> float:
    """How often a loss reads the head, counted in elements that the interpreter loads."""
    from triton.runtime.interpreter import InterpreterBuilder

    hidden, unembed, labels = given(lost)
    begin, end = unembed.data_ptr(), unembed.data_ptr() + unembed.nbytes
    load, read = InterpreterBuilder.create_masked_load, 0

    def counting(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        nonlocal read
        read += int(((ptrs.data >= begin) & (ptrs.data < end) & mask.data).sum())
        return load(self, ptrs, mask, *rest, **named)

    with patch.object(InterpreterBuilder, "create_masked_load", counting), torch.no_grad():
        linear_cross_entropy(hidden, unembed, labels, backend="anchored")
    return read / unembed.numel()


LOST = {"none": [], "one": [37], "one in a tile": [0, 17, 47], "half": list(range(1, T, 2)), "all": list(range(T))}


SLOW = pytest.mark.slow
QUICK = ("half", True), ("one in a tile", False)


@pytest.mark.parametrize(
    ("lost", "stats"),
    [
        pytest.param(lost, stats, marks=[] if (lost, stats) in QUICK else SLOW)
        for lost in LOST
        for stats in (False, True)
    ],
)
def test_lost_rows_are_right_among_others(lost, stats, interpreter):
    assert interpreter.run(largest_error, lost=LOST[lost], stats=stats) <= 2e-6


@pytest.mark.parametrize("lost", LOST)
def test_the_head_is_read_twice_more_for_a_tile_of_rows_and_not_for_each_row(lost, interpreter):
    tiles, with_lost = math.ceil(T / 16), len({row // 16 for row in LOST[lost]})
    labels = T / V  # the label's row of the head
    assert interpreter.run(head_reads, lost=LOST[lost]) == pytest.approx(tiles + 2 * with_lost + labels)
