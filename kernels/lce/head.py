"""What a back end of linear_cross_entropy gets, the output head, and what it makes of the rows of a chunk."""

from dataclasses import dataclass

import torch

from tunesmith.kernels.device import add_mm_fp32, mm_fp32


@dataclass
class Rows:
    """What some rows come to, [C] each."""

    nll: torch.Tensor
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None  # 1 or True where no logit is above the label's
    grad_hidden: torch.Tensor | None = None  # [C, D], times the coefficient


@dataclass
class Head:
    """The output head during one call: its weights, what is wanted of it, its gradients so far.

    C rows of a chunk, D hidden, V vocabulary. Gradients add up over chunks in float32, or float64 for it.
    """

    unembed_VD: torch.Tensor
    bias_V: torch.Tensor | None  # float32 or wider
    logit_scale: float
    logit_softcap: float | None
    wants_hidden: bool
    wants_stats: bool
    grad_unembed: torch.Tensor | None = None  # [V, D], where it is wanted
    grad_bias: torch.Tensor | None = None  # [V]
    is_first: bool = True  # the first chunk starts grad_unembed, which holds anything before
    most_rows: int = 0  # of the chunks to come
    _slab: torch.Tensor | None = None

    @property
    def wants_gradient(self) -> bool:
        return self.wants_hidden or self.grad_unembed is not None or self.grad_bias is not None

    def widen(self) -> None:
        """16-bit weights to float32, once a call: products of 16 bits on a CPU round to 16 bits and are slower."""
        if self.unembed_VD.dtype != torch.float64:
            self.unembed_VD = self.unembed_VD.float()

    def slab(self, num_rows: int, alignment: int) -> torch.Tensor:
        """Room for the logits of a chunk in the head's dtype, [num_rows, V rounded up], the same memory each time."""
        width = -(-len(self.unembed_VD) // alignment) * alignment
        if self._slab is None or len(self._slab) < num_rows:
            self._slab = self.unembed_VD.new_empty(max(num_rows, self.most_rows), width)
        return self._slab[:num_rows]

    def backward(self, grad_CV: torch.Tensor, hidden_CD: torch.Tensor) -> torch.Tensor | None:
        """From the gradient of the products: adds to the head's own; returns that of hidden, [C, D], if wanted."""
        small_CV = grad_CV.to(self.unembed_VD.dtype)
        if self.grad_unembed is not None:
            add_mm_fp32(self.grad_unembed, small_CV.t(), hidden_CD, start=self.is_first)
        if self.grad_bias is not None:
            self.grad_bias += grad_CV.sum(0, dtype=self.grad_bias.dtype)
        return mm_fp32(small_CV, self.unembed_VD) if self.wants_hidden else None


def make_head(
    unembed_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    *,
    wants_hidden: bool,
    wants_unembed: bool,
    wants_bias: bool,
    wants_stats: bool,
) -> Head:
    """A head with room for the gradients that are wanted."""
    wide = torch.float64 if unembed_VD.dtype == torch.float64 else torch.float32
    return Head(
        unembed_VD=unembed_VD,
        bias_V=None if bias_V is None else bias_V.to(wide),
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        wants_hidden=wants_hidden,
        wants_stats=wants_stats,
        grad_unembed=torch.empty_like(unembed_VD, dtype=wide) if wants_unembed else None,
        grad_bias=torch.zeros(len(unembed_VD), dtype=wide, device=unembed_VD.device) if wants_bias else None,
    )
