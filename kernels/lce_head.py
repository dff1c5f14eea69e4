"""The output head during one call of linear_cross_entropy: its weights, what is wanted of it, its gradients so far."""

from dataclasses import dataclass

import torch

from tunesmith.kernels.lce_rows import Slice, Terms


@dataclass
class Head:
    """D hidden, V vocabulary of this rank's slice. Gradients add up over chunks in float32, or float64 for it."""

    unembed_VD: torch.Tensor
    bias_V: torch.Tensor | None
    terms: Terms
    vocabulary: Slice
    wants_hidden: bool
    wants_stats: bool
    grad_unembed: torch.Tensor | None = None  # [V, D], where it is wanted
    grad_bias: torch.Tensor | None = None  # [V]
    is_first: bool = True  # the first chunk starts grad_unembed, which holds anything before

    @property
    def wants_gradient(self) -> bool:
        return self.wants_hidden or self.grad_unembed is not None or self.grad_bias is not None


def make_head(
    unembed_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    terms: Terms,
    vocabulary: Slice,
    *,
    wants_hidden: bool,
    wants_unembed: bool,
    wants_bias: bool,
    wants_stats: bool,
) -> Head:
    """A head with room for the gradients that are wanted.

    16-bit weights on the CPU are widened once a call: its 16-bit products round to 16 bits and are slower.
    """
    wide = torch.float64 if unembed_VD.dtype == torch.float64 else torch.float32
    if unembed_VD.device.type == "cpu":
        unembed_VD = unembed_VD.to(wide)
    return Head(
        unembed_VD=unembed_VD,
        bias_V=None if bias_V is None else bias_V.to(wide),
        terms=terms,
        vocabulary=vocabulary,
        wants_hidden=wants_hidden,
        wants_stats=wants_stats,
        grad_unembed=torch.empty_like(unembed_VD, dtype=wide) if wants_unembed else None,
        grad_bias=torch.zeros(len(unembed_VD), dtype=wide, device=unembed_VD.device) if wants_bias else None,
    )
