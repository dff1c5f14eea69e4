"""Cross-entropy of next-token logits, per token.

    nll[t] = logsumexp_v(logits[t, v]) - logits[t, labels[t]]

The plain-torch form, which every kernel of this operation is held against.
"""

import torch
import torch.nn.functional as F


def token_nll(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each label.

    Args:
        logits_TV: [T, V], any float dtype; the softmax is taken in float32.
        labels_T: token ids, [T], int64; every one counts (rows without a target are left out before).
    Returns: nll_T, [T], float32, in nats.
    Raises: ValueError when shapes disagree.
    """
    if logits_TV.ndim != 2 or labels_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_TV.shape)} and labels {tuple(labels_T.shape)} are not [T, V] and [T].")
    return F.cross_entropy(logits_TV.float(), labels_T, reduction="none")
