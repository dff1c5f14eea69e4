"""What the back ends of linear_cross_entropy share: the terms of the loss, and the formulas of one row.

C rows of a chunk, D hidden, V vocabulary (of this rank's slice), R ranks that share the vocabulary.

Everything about a row follows from two numbers: a, the logit of its label, and o = logsumexp of all other logits.
Leaving the label out of the sum is what keeps rows exact that are nearly certain, where 1 - p(label) would cancel:

    nll = log(1 + exp(o - a))        p = 1 / (1 + exp(o - a))        q = 1 - p = 1 / (1 + exp(a - o))
    loss = nll + smoothing * (a - mean of all logits) + z_loss * (a + nll)^2
    dloss/dz[v] = c * q * exp(z[v] - o) - smoothing / V,  c = 1 + 2 * z_loss * (a + nll),  for every v but the label
    dloss/dz[y] = -q + 2 * z_loss * (a + nll) * p + smoothing - smoothing / V

    entropy = p * nll + q * log(1 + exp(a - o)) + q * entropy of the others,  none of which is below 0

exp(z[v] - o) is the softmax of the others among themselves, and their entropy that of it: what is subtracted there is
never larger than their own spread.
"""

from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F

NO_LOGIT = float("-inf")


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

    def own(self, labels_C: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Labels as rows of this rank's unembed, [C] int64; -1 where another rank holds it."""
        if self.group is None:
            return labels_C
        local_C = labels_C - self.start
        return torch.where((local_C >= 0) & (local_C < num_rows), local_C, -1)

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
    largest: torch.Tensor  # of all other logits; -inf where there is none
    log_sum: torch.Tensor  # log of the others' sum of exp(z - largest), so that o = largest + log_sum; 0 without others
    total: torch.Tensor | None = None  # sum of all logits, for label smoothing
    others_entropy: torch.Tensor | None = None  # of the others' own softmax, nats


@dataclass
class Factors:
    """What makes logits their gradient, [C] each, already times the row's coefficient."""

    others: torch.Tensor  # coefficient * c * q, of the others' own softmax
    label: torch.Tensor  # coefficient * (-q + 2 z_loss lse p + smoothing); without - smoothing / V
    smoothing: torch.Tensor | None  # coefficient * smoothing / V


@dataclass
class Rows:
    """What the rows of a chunk come to, [C] each."""

    nll: torch.Tensor
    loss: torch.Tensor
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    grad_hidden: torch.Tensor | None = None  # [C, D], times the coefficient and summed over the ranks


def whole_rows(
    sums: LogitSums, coefficient_C: torch.Tensor, terms: Terms, vocabulary: Slice
) -> tuple[Rows, Factors, LogitSums]:
    """The formulas above, from what every rank found in its slice; and the sums of the whole vocabulary."""
    sums = _over_ranks(sums, vocabulary)
    margin = (sums.largest - sums.label) + sums.log_sum  # in this order: the first difference is nearly exact
    margin = torch.where(sums.label < float("inf"), margin, float("nan"))  # overflowed, not certain
    nll = F.softplus(margin)
    q = torch.sigmoid(margin)
    loss, others, label = nll, q, -q
    if terms.z_loss:
        lse = sums.label + nll
        loss = loss + terms.z_loss * lse * lse
        others = q * (1 + 2 * terms.z_loss * lse)
        label = label + 2 * terms.z_loss * lse * torch.sigmoid(-margin)
    smoothing = None
    if terms.label_smoothing:
        assert sums.total is not None
        loss = loss + terms.label_smoothing * (sums.label - sums.total / vocabulary.size)
        label = label + terms.label_smoothing
        smoothing = coefficient_C * (terms.label_smoothing / vocabulary.size)
    rows = Rows(nll=nll, loss=loss)
    if sums.others_entropy is not None:
        # Of no others (margin -inf), softplus(-margin) is infinite and q is 0.
        rows.entropy = nll * torch.sigmoid(-margin) + torch.where(
            q > 0, q * (F.softplus(-margin) + sums.others_entropy), 0
        )
        rows.correct = sums.largest <= sums.label
    return rows, Factors(coefficient_C * others, coefficient_C * label, smoothing), sums


def _over_ranks(sums: LogitSums, vocabulary: Slice) -> LogitSums:
    """The sums over the whole vocabulary, from one all-reduce."""
    if vocabulary.group is None:
        return sums
    parts = [sums.label, sums.largest, sums.log_sum, sums.total, sums.others_entropy]
    stacked = torch.stack([part if part is not None else torch.zeros_like(sums.label) for part in parts])
    label, largest, log_sum, total, entropy = vocabulary.side_by_side(stacked).unbind(0)
    top = largest.amax(-1)
    shares = torch.where(largest > NO_LOGIT, torch.exp(largest - top[:, None] + log_sum), 0)  # of each slice
    whole = shares.sum(-1)
    return LogitSums(
        label=label.sum(-1),
        largest=top,
        log_sum=torch.where(whole > 0, torch.log(whole), 0),
        total=None if sums.total is None else total.sum(-1),
        others_entropy=None if sums.others_entropy is None else _joined_entropy(shares, entropy),
    )


def _joined_entropy(shares_CR: torch.Tensor, entropy_CR: torch.Tensor) -> torch.Tensor:
    """Entropy of a distribution from the shares and entropies of its parts, [C]; 0 where every share is 0."""
    shares_CR = shares_CR / shares_CR.sum(-1, keepdim=True).clamp(min=torch.finfo(shares_CR.dtype).tiny)
    return (shares_CR * (entropy_CR - torch.where(shares_CR > 0, torch.log(shares_CR), 0))).sum(-1)
