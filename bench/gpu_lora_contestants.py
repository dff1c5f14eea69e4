"""Ways to compute a group of LoRA layers that share their input, for gpu_lora.py: ours and the others'.

A contestant is a module whose parameters are the adapters' A and B; called with x it returns the outputs of the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.kernels.lora.lora_linear import lora_linear_group

Layers = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Weights:
    """Of one group, with frozen base weights. O out features, K in features, r ranks."""

    base: list[torch.Tensor]  # [O, K]
    lora_a: list[torch.Tensor]  # [r, K]
    lora_b: list[torch.Tensor]  # [O, r]
    scaling: float
    dropout_p: float


def ours(weights: Weights, backend: str) -> Layers:
    scalings = [weights.scaling] * len(weights.base)
    return lambda x: lora_linear_group(
        x, weights.base, weights.lora_a, weights.lora_b, scalings, dropout_p=weights.dropout_p, seed=11, backend=backend
    )


def bare(weights: Weights) -> Layers:
    """Without adapters: what the base products alone take."""
    return lambda x: _Bare.apply(x, *weights.base)


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*base)
        return tuple(F.linear(x, weight) for weight in base)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        return _products(dys, ctx.saved_tensors), *[None] * len(dys)


def _products(dys: tuple[torch.Tensor, ...], base: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of dy W, the later ones added on by cuBLAS."""
    dx = dys[0] @ base[0]
    for dy, weight in zip(dys[1:], base[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


def base_first(weights: Weights) -> Layers:
    """Unsloth's scheme, restated: base product first, then y += s (x A^T) B^T in place by cuBLAS; x A^T again in the
    backward; no kernel of its own. Its fast path has no dropout: with it, the dropped x is kept, as axolotl does.
    """
    return lambda x: _BaseFirst.apply(x, weights, *weights.lora_a, *weights.lora_b)


class _BaseFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: Weights, *adapters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(weights.base)
        dropped, mask = x, None
        if weights.dropout_p:
            dropped, mask = torch.native_dropout(x, weights.dropout_p, True)
        outputs = []
        for weight, a, b in zip(weights.base, adapters[:count], adapters[count:], strict=True):
            y = x @ weight.t()
            y.addmm_(dropped @ a.t(), b.t(), alpha=weights.scaling)
            outputs.append(y)
        ctx.weights = weights
        ctx.save_for_backward(dropped, mask, *adapters)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        dropped, mask, *adapters = ctx.saved_tensors
        weights, count = ctx.weights, len(dys)
        das, dbs = [], []
        dx = _products(dys, tuple(weights.base))
        through_adapters = torch.zeros_like(dx) if mask is not None else dx
        for dy, a, b in zip(dys, adapters[:count], adapters[count:], strict=True):
            du = dy @ b
            das.append((du.t() @ dropped).mul_(weights.scaling))
            dbs.append((dy.t() @ (dropped @ a.t())).mul_(weights.scaling))
            through_adapters.addmm_(du, a, alpha=weights.scaling)
        if mask is not None:
            dx += through_adapters * mask / (1 - weights.dropout_p)
        return dx, None, *das, *dbs


def peft(weights: Weights) -> Layers:
    """PEFT's own layers, adapters in the dtype of the base weights, which is its faster setting."""
    from peft import LoraConfig, get_peft_model

    names = [f"layer_{number}" for number in range(len(weights.base))]
    rank = len(weights.lora_a[0])
    group = _Group(names)
    for name, weight in zip(names, weights.base, strict=True):
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        group.add_module(name, layer)
    settings = LoraConfig(
        r=rank, lora_alpha=weights.scaling * rank, lora_dropout=weights.dropout_p, target_modules=names, bias="none"
    )
    model = get_peft_model(group, settings, autocast_adapter_dtype=False)
    for name, a, b in zip(names, weights.lora_a, weights.lora_b, strict=True):
        layer = getattr(group, name)
        layer.lora_A["default"].weight = a
        layer.lora_B["default"].weight = b
    return model.train()


class _Group(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in self.names)
