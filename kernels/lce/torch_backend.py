"""linear_cross_entropy in plain torch, chunk by chunk: for the CPU, and for what the Triton back ends do not cover.

The mathematics is that of rows.py. C rows of a chunk, D hidden, V vocabulary of this rank's slice. Logits and their
gradient live in one [C, V] slab (two with a soft cap or statistics), in float32, or float64 for float64 inputs.
"""

import torch

from tunesmith.kernels.device import add_mm_fp32, mm_fp32
from tunesmith.kernels.lce.head import Head
from tunesmith.kernels.lce.rows import NO_LOGIT, Factors, LogitSums, Rows, whole_rows


def chunk(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, coefficient_C: torch.Tensor) -> Rows:
    """Loss of C rows; adds their share to the head's gradients, and fills rows.grad_hidden where it is wanted."""
    hidden_CD = hidden_CD.to(head.unembed_VD.dtype)
    logits_CV, slope_CV = capped_logits(head, hidden_CD)
    own_C = head.vocabulary.own(labels_C, logits_CV.shape[1])
    ours_C, own_C = own_C >= 0, own_C.clamp(min=0)
    label_C = torch.where(ours_C, logits_CV.gather(1, own_C[:, None])[:, 0], 0)
    total_C = logits_CV.sum(1) if head.terms.label_smoothing else None
    _leave_out(logits_CV, own_C, ours_C)
    exp_CV, sums = _sums(head, logits_CV, label_C, total_C)
    rows, factors, whole = whole_rows(sums, coefficient_C, head.terms, head.vocabulary)
    if head.wants_gradient:
        share_C = torch.exp((sums.largest - whole.largest) - whole.log_sum)
        factor_C = torch.where(sums.largest > NO_LOGIT, factors.others * share_C, 0)
        grad_CV = _grad_logits(exp_CV, factor_C, factors, own_C, ours_C)
        if slope_CV is not None:
            grad_CV.mul_(slope_CV)
        if head.terms.logit_scale != 1:
            grad_CV.mul_(head.terms.logit_scale)
        _use(head, rows, grad_CV, hidden_CD)
    return rows


def capped_logits(head: Head, hidden_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softcap(scale * (h . w + b)), [C, V], and its slope in what is capped, [C, V] or None without a cap."""
    logits_CV = mm_fp32(hidden_CD, head.unembed_VD.t())
    if head.bias_V is not None:
        logits_CV += head.bias_V
    if head.terms.logit_scale != 1:
        logits_CV *= head.terms.logit_scale
    cap = head.terms.logit_softcap
    if cap is None:
        return logits_CV, None
    logits_CV.div_(cap).tanh_()
    slope_CV = logits_CV.square().neg_().add_(1) if head.wants_gradient else None
    return logits_CV.mul_(cap), slope_CV


def _leave_out(logits_CV: torch.Tensor, own_C: torch.Tensor, ours_C: torch.Tensor) -> None:
    """Sets the label's logit to -inf where this rank holds it."""
    kept_C = logits_CV.gather(1, own_C[:, None])
    logits_CV.scatter_(1, own_C[:, None], torch.where(ours_C[:, None], NO_LOGIT, kept_C))


def _sums(
    head: Head, logits_CV: torch.Tensor, label_C: torch.Tensor, total_C: torch.Tensor | None
) -> tuple[torch.Tensor, LogitSums]:
    """exp(logit - largest), [C, V], in the memory of the logits unless statistics need both; and the sums."""
    found_C = logits_CV.amax(1)
    largest_C = torch.where(found_C > NO_LOGIT, found_C, 0)  # a vocabulary of one: there is no other logit
    logits_CV.sub_(largest_C[:, None])
    exp_CV = logits_CV.exp() if head.wants_stats else logits_CV.exp_()
    sum_C = exp_CV.sum(1)
    sums = LogitSums(label_C, found_C, torch.where(sum_C > 0, torch.log(sum_C), 0), total_C)
    if head.wants_stats:
        distance_C = logits_CV.masked_fill_(exp_CV == 0, 0).mul_(exp_CV).sum(1)
        sums.others_entropy = sums.log_sum - torch.where(sum_C > 0, distance_C / sum_C, 0)
    return exp_CV, sums


def _grad_logits(
    grad_CV: torch.Tensor, factor_C: torch.Tensor, factors: Factors, own_C: torch.Tensor, ours_C: torch.Tensor
) -> torch.Tensor:
    """Turns exp(logit - largest) into the gradient of the capped logits, in place."""
    grad_CV.mul_(factor_C[:, None])
    label_C = factors.label
    if factors.smoothing is not None:
        grad_CV.sub_(factors.smoothing[:, None])
        label_C = label_C - factors.smoothing
    kept_C = grad_CV.gather(1, own_C[:, None])[:, 0]
    return grad_CV.scatter_(1, own_C[:, None], torch.where(ours_C, label_C, kept_C)[:, None])


def _use(head: Head, rows: Rows, grad_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """The three gradients from that of the logits."""
    small_CV = grad_CV.to(head.unembed_VD.dtype)
    if head.wants_hidden:
        rows.grad_hidden = head.vocabulary.sum(mm_fp32(small_CV, head.unembed_VD))
    if head.grad_unembed is not None:
        add_mm_fp32(head.grad_unembed, small_CV.t(), hidden_CD, start=head.is_first)
    if head.grad_bias is not None:
        head.grad_bias += grad_CV.sum(0)
