"""linear_cross_entropy in plain torch, chunk by chunk: for the CPU, and for what the Triton back ends do not cover.

Everything about a row follows from two numbers: a, the logit of its label, and o = logsumexp of all other logits.
Leaving the label out of the sum is what keeps rows exact that are nearly certain, where 1 - p(label) would cancel:

    nll = log(1 + exp(o - a))        p = 1 / (1 + exp(o - a))        q = 1 - p = 1 / (1 + exp(a - o))
    dnll/dz[v] = q * exp(z[v] - o) for every v but the label        dnll/dz[label] = -q

    entropy = p * nll + q * log(1 + exp(a - o)) + q * entropy of the others,  none of which is below 0

exp(z[v] - o) is the softmax of the others among themselves, and their entropy that of it: what is subtracted there is
never larger than their own spread. row_math.py has the same formulas for the Triton back ends.

C rows of a chunk, D hidden, V vocabulary. Logits and their gradient live in one [C, V] slab (two with a soft cap or
statistics), in float32, or float64 for float64 inputs.
"""

import torch
import torch.nn.functional as F

from tunesmith.kernels.device import mm_fp32
from tunesmith.kernels.lce.head import Head, Rows

NO_LOGIT = float("-inf")


def chunk(head: Head, hidden_CD: torch.Tensor, labels_C: torch.Tensor, coefficient_C: torch.Tensor) -> Rows:
    """Loss of C rows; adds their share to the head's gradients, and fills rows.grad_hidden where it is wanted."""
    hidden_CD = hidden_CD.to(head.unembed_VD.dtype)
    logits_CV, slope_CV = _capped_logits(head, hidden_CD)
    labels_C1 = labels_C[:, None]
    label_C = logits_CV.gather(1, labels_C1)[:, 0]
    exp_CV, largest_C, log_sum_C, others_entropy_C = _of_others(logits_CV.scatter_(1, labels_C1, NO_LOGIT), head)
    margin_C = (largest_C - label_C) + log_sum_C  # o - a, in this order: the first difference is nearly exact
    margin_C = torch.where(label_C < float("inf"), margin_C, float("nan"))  # overflowed, not certain
    q_C = torch.sigmoid(margin_C)
    rows = Rows(nll=F.softplus(margin_C))
    if others_entropy_C is not None:
        # Of no others (margin -inf), softplus(-margin) is infinite and q is 0.
        of_others_C = torch.where(q_C > 0, q_C * (F.softplus(-margin_C) + others_entropy_C), 0)
        rows.entropy = rows.nll * torch.sigmoid(-margin_C) + of_others_C
        rows.correct = largest_C <= label_C
    if head.wants_gradient:
        factor_C = coefficient_C * q_C
        grad_CV = exp_CV.mul_((factor_C * torch.exp(-log_sum_C))[:, None]).scatter_(1, labels_C1, -factor_C[:, None])
        if slope_CV is not None:
            grad_CV.mul_(slope_CV)
        if head.logit_scale != 1:
            grad_CV.mul_(head.logit_scale)
        rows.grad_hidden = head.backward(grad_CV, hidden_CD)
    return rows


def _capped_logits(head: Head, hidden_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softcap(scale * (h . w + b)), [C, V], and its slope in what is capped, [C, V] or None without a cap."""
    logits_CV = mm_fp32(hidden_CD, head.unembed_VD.t())
    if head.bias_V is not None:
        logits_CV += head.bias_V
    if head.logit_scale != 1:
        logits_CV *= head.logit_scale
    cap = head.logit_softcap
    if cap is None:
        return logits_CV, None
    logits_CV.div_(cap).tanh_()
    slope_CV = logits_CV.square().neg_().add_(1) if head.wants_gradient else None
    return logits_CV.mul_(cap), slope_CV


def _of_others(
    logits_CV: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of logits without the label's: exp(logit - largest), [C, V], in their memory unless statistics need both; the
    largest, -inf where there is none, and the log of the sum of exp, 0 without others; their entropy if it is wanted.
    """
    found_C = logits_CV.amax(1)
    largest_C = torch.where(found_C > NO_LOGIT, found_C, 0)  # a vocabulary of one: there is no other logit
    logits_CV.sub_(largest_C[:, None])
    exp_CV = logits_CV.exp() if head.wants_stats else logits_CV.exp_()
    sum_C = exp_CV.sum(1)
    log_sum_C = torch.where(sum_C > 0, torch.log(sum_C), 0)
    entropy_C = None
    if head.wants_stats:
        distance_C = logits_CV.masked_fill_(exp_CV == 0, 0).mul_(exp_CV).sum(1)
        entropy_C = log_sum_C - torch.where(sum_C > 0, distance_C / sum_C, 0)
    return exp_CV, found_C, log_sum_C, entropy_C
