"""What the back ends of linear_cross_entropy share: the terms of the loss, and the formulas of one row.

C rows of a chunk, D hidden, V vocabulary (of this rank's slice), R ranks that share the vocabulary.

Everything about a row follows from two numbers: a, the logit of its label, and o = logsumexp of all other logits.
Leaving the label out of the sum is what keeps rows exact that are nearly certain, where 1 - p(label) would cancel:

    nll = log(1 + exp(o - a))        p = 1 / (1 + exp(o - a))        q = 1 - p = 1 / (1 + exp(a - o))
    loss = nll + smoothing * (a - mean of all logits) + z_loss * (a + nll)^2
    dloss/dz[v] = c * exp(z[v] - a - nll) - smoothing / V,  c = 1 + 2 * z_loss * (a + nll),  for every v but the label
    dloss/dz[y] = -q + 2 * z_loss * (a + nll) * p + smoothing - smoothing / V
"""

from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F


@dataclass(frozen=True)
class Terms:
    """What the loss is made of besides the labels' log-probabilities; the logits are softcap(scale * (h . w + b))."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Slice:
    """Which tokens of the vocabulary this rank holds: start .. start + its rows of unembed, of size in all."""

    start: int
    size: int
    group: torch.distributed.ProcessGroup | None = None

    def own(self, labels_C: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels as rows of this rank's unembed, [C] int64, 0 where another rank holds it; and where it is ours."""
        if self.group is None:
            return labels_C, torch.ones_like(labels_C, dtype=torch.bool)
        local_C = labels_C - self.start
        ours_C = (local_C >= 0) & (local_C < num_rows)
        return torch.where(ours_C, local_C, 0), ours_C

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None:
            torch.distributed.all_reduce(values, group=self.group)
        return values

    def side_by_side(self, values_XC: torch.Tensor) -> torch.Tensor:
        """[X, C] of each rank -> [X, C, R], by one sum: each rank fills its own slot, so that no maximum is needed."""
        if self.group is None:
            return values_XC[..., None]
        num_ranks = torch.distributed.get_world_size(self.group)
        slots = values_XC.new_zeros(*values_XC.shape, num_ranks)
        slots[..., torch.distributed.get_rank(self.group)] = values_XC
        return self.sum(slots)


@dataclass
class LogitSums:
    """What one pass over the logits of this rank's slice finds, [C] each, in float32 or float64."""

    label: torch.Tensor  # logit of the label, a; 0 where another rank holds it
    others: torch.Tensor  # logsumexp of all other logits; -inf where there is none
    total: torch.Tensor | None = None  # sum of all logits, for label smoothing
    others_max: torch.Tensor | None = None  # largest of all others, for correct
    others_mean: torch.Tensor | None = None  # mean of the others under their own softmax, for the entropy


@dataclass
class Rows:
    """What a chunk comes to. Vectors are [C]; those for the gradient are already times the row's coefficient."""

    label: torch.Tensor  # a
    nll: torch.Tensor
    loss: torch.Tensor
    others: torch.Tensor  # o
    others_factor: torch.Tensor  # coefficient * c
    label_factor: torch.Tensor  # coefficient * (-q + 2 z lse p + smoothing); without - smoothing / V
    smoothing_factor: torch.Tensor | None  # coefficient * smoothing / V
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    grad_hidden: torch.Tensor | None = None  # [C, D], float32 or wider, summed over the ranks


def whole_rows(sums: LogitSums, coefficient_C: torch.Tensor, terms: Terms, vocabulary: Slice) -> Rows:
    """The formulas above, from what every rank found in its slice."""
    sums = _over_ranks(sums, vocabulary)
    margin = sums.others - sums.label
    nll = F.softplus(margin)
    q = torch.sigmoid(margin)
    loss, factor = nll, torch.ones_like(nll)
    label_factor = -q
    if terms.z_loss:
        lse = sums.label + nll
        loss = loss + terms.z_loss * lse * lse
        factor = 1 + 2 * terms.z_loss * lse
        label_factor = label_factor + 2 * terms.z_loss * lse * torch.sigmoid(-margin)
    smoothing_factor = None
    if terms.label_smoothing:
        assert sums.total is not None
        loss = loss + terms.label_smoothing * (sums.label - sums.total / vocabulary.size)
        label_factor = label_factor + terms.label_smoothing
        smoothing_factor = coefficient_C * (terms.label_smoothing / vocabulary.size)
    rows = Rows(
        label=sums.label,
        nll=nll,
        loss=loss,
        others=sums.others,
        others_factor=coefficient_C * factor,
        label_factor=coefficient_C * label_factor,
        smoothing_factor=smoothing_factor,
    )
    if sums.others_mean is not None and sums.others_max is not None:
        rows.entropy = nll + q * torch.where(q > 0, sums.label - sums.others_mean, 0)
        rows.correct = sums.others_max <= sums.label
    return rows


def _over_ranks(sums: LogitSums, vocabulary: Slice) -> LogitSums:
    """The sums over the whole vocabulary, from one all-reduce."""
    if vocabulary.group is None:
        return sums
    parts = [sums.label, sums.others, sums.total, sums.others_max, sums.others_mean]
    stacked = torch.stack([part if part is not None else torch.zeros_like(sums.label) for part in parts])
    label, others, total, largest, mean = vocabulary.side_by_side(stacked).unbind(0)
    whole = torch.logsumexp(others, -1)
    share = torch.exp(others - whole[:, None])
    return LogitSums(
        label=label.sum(-1),
        others=whole,
        total=None if sums.total is None else total.sum(-1),
        others_max=None if sums.others_max is None else largest.amax(-1),
        others_mean=None if sums.others_mean is None else torch.where(share > 0, share * mean, 0).sum(-1),
    )
