"""The output head during one call of linear_cross_entropy: its weights, what is wanted of it, its gradients so far."""

from dataclasses import dataclass

import torch

from tunesmith.kernels.lce.rows import Slice, Terms


@dataclass
class Head:
    """D hidden, V vocabulary of this rank's slice. Gradients add up over chunks in float32, or float64 for it."""

    unembed_VD: torch.Tensor
    bias_V: torch.Tensor | None  # float32 or wider
    terms: Terms
    vocabulary: Slice
    wants_hidden: bool
    wants_stats: bool
    grad_unembed: torch.Tensor | None = None  # [V, D], where it is wanted
    grad_bias: torch.Tensor | None = None  # [V]
    is_first: bool = True  # the first chunk starts grad_unembed, which holds anything before
    _slab: torch.Tensor | None = None
    _token_sum: torch.Tensor | None = None
    _every_token: torch.Tensor | None = None  # [D]: what finish() takes from the gradient of every row of unembed

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
            self._slab = self.unembed_VD.new_empty(num_rows, width)
        return self._slab[:num_rows]

    def token_sum(self) -> torch.Tensor:
        """Sum of all rows of unembed, [D] float32, for label smoothing: read once a call."""
        if self._token_sum is None:
            self._token_sum = self.unembed_VD.sum(0, dtype=torch.float32)
        return self._token_sum

    def bias_sum(self) -> torch.Tensor:
        """Sum of the bias, [] float32, on the device."""
        return self.unembed_VD.new_zeros((), dtype=torch.float32) if self.bias_V is None else self.bias_V.sum()

    def take_from_every_token(self, share_D: torch.Tensor) -> None:
        """Label smoothing pulls every token down alike: kept as one row until all chunks are done."""
        self._every_token = share_D if self._every_token is None else self._every_token + share_D

    def finish(self) -> None:
        """Call it once all chunks are done."""
        if self.grad_unembed is None:
            return
        if self.is_first:
            self.grad_unembed.zero_()  # there was no row at all
        elif self._every_token is not None:
            self.grad_unembed -= self._every_token


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
    """A head with room for the gradients that are wanted."""
    wide = torch.float64 if unembed_VD.dtype == torch.float64 else torch.float32
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
