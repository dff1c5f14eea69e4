"""The gradient of a group of LoRA layers that share their input: what is kept, and the order of the passes.

Written over a back end, torch_backend.py or triton_backend.py, whose passes do the work beside the base products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from tunesmith.kernels.device import on_its_device, without_autocast
from tunesmith.kernels.philox import Dropout


@dataclass(frozen=True)
class LoraCall:
    """What a call computes, besides its tensors."""

    back_end: ModuleType
    scales: tuple[float, ...]  # scaling times dropout's factor 1 / (1 - p), so that only these know of it
    transposed: bool
    drop: Dropout | None

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """[O, K], a view."""
        return weight.t() if self.transposed else weight


def _stacked(matrices: Sequence[torch.Tensor], step: int) -> tuple[torch.Tensor, list[int]]:
    """A matrices one below the other, each with zero rows up to a multiple of step; and where each begins."""
    padded = [-len(a_RK) % step for a_RK in matrices]
    starts = [0]
    for a_RK, pad in zip(matrices, padded, strict=True):
        starts.append(starts[-1] + len(a_RK) + pad)
    if len(matrices) == 1 and not padded[0]:
        return matrices[0], starts
    rows = [part for a, pad in zip(matrices, padded, strict=True) for part in (a, a.new_zeros(pad, a.shape[1]))]
    return torch.cat(rows), starts


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("lora_linear has no second derivative: call backward without create_graph=True.")


class LoraLinear(torch.autograd.Function):
    """apply(call, x, *weights, *lora_as, *lora_bs, *biases) -> outputs."""

    @staticmethod
    def forward(ctx: Any, call: LoraCall, x: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        count = len(call.scales)
        weights, lora_as, lora_bs, biases = (tensors[i * count : (i + 1) * count] for i in range(4))
        x_NK = x.view(-1, x.shape[-1])
        a_RK, starts = _stacked(lora_as, call.back_end.RANK_STEP)  # type: ignore[arg-type]
        outputs = []
        with on_its_device(x.device):
            u_NR = call.back_end.down(x_NK, a_RK, call.drop)
            for i, scale in enumerate(call.scales):
                y_NO = call.back_end.up(u_NR[:, starts[i] :], lora_bs[i], scale, biases[i])
                y_NO.addmm_(x_NK, call.weight(weights[i]).t())  # type: ignore[arg-type]
                # No view to autograd: what is a view of something made in here cannot be changed in place.
                outputs.append(torch.ops.aten._unsafe_view(y_NO, [*x.shape[:-1], y_NO.shape[1]]))
        wants_x, wants = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        wants_weights, wants_as, wants_bs = any(wants[:count]), any(wants[count : 2 * count]), wants[2 * count :]
        ctx.save_for_backward(
            x if wants_weights or wants_as else None,
            u_NR if any(wants_bs[:count]) else None,
            *(weights if wants_x else [None] * count),
            *lora_as,
            *lora_bs,
        )
        ctx.call, ctx.starts, ctx.shape, ctx.device = call, starts, x.shape, x.device
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        _refuse_second_derivative()
        with without_autocast(ctx.device):
            return None, *_Backward(ctx, gradients).run()


class _Backward:
    """One backward pass of a group. Members whose output nobody used have no gradient and cost nothing."""

    def __init__(self, ctx: Any, gradients: tuple[torch.Tensor | None, ...]) -> None:
        self.call, self.starts, self.shape = ctx.call, ctx.starts, ctx.shape
        self.count = count = len(gradients)
        x, self.u_NR, *rest = ctx.saved_tensors
        self.x_NK = None if x is None else x.view(-1, x.shape[-1])
        self.weights, self.lora_as, self.lora_bs = (rest[i * count : (i + 1) * count] for i in range(3))
        self.wants_x, wants = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        self.wants = [wants[i * count : (i + 1) * count] for i in range(4)]  # weights, As, Bs, biases
        self.dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]).contiguous() for dy in gradients]

    def run(self) -> tuple[torch.Tensor | None, ...]:
        wants_weights, _, _, wants_biases = self.wants
        du_NR, dbs = self._up()
        das: list[torch.Tensor | None] = [None] * self.count
        dx_NK = None
        if du_NR is not None:
            das, dx_NK = self._down(du_NR)
        dws: list[torch.Tensor | None] = [None] * self.count
        dbiases: list[torch.Tensor | None] = [None] * self.count
        for i, dy_NO in enumerate(self.dys):
            if dy_NO is None:
                continue
            if dx_NK is not None:
                dx_NK.addmm_(dy_NO, self.call.weight(self.weights[i]))
            if wants_weights[i]:
                assert self.x_NK is not None
                dws[i] = self.x_NK.t() @ dy_NO if self.call.transposed else dy_NO.t() @ self.x_NK
            if wants_biases[i]:
                dbiases[i] = dy_NO.sum(0)
        return None if dx_NK is None else dx_NK.view(self.shape), *dws, *das, *dbs, *dbiases

    def _up(self) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """du of all members, where x or an A needs it, and dB of each: one read of each dy."""
        dbs: list[torch.Tensor | None] = [None] * self.count
        first = next((dy for dy in self.dys if dy is not None), None)
        du_NR = None
        if first is not None and (self.wants_x or any(self.wants[1])):
            du_NR = first.new_empty(len(first), self.starts[-1])
        for i, dy_NO in enumerate(self.dys):
            start, end = self.starts[i], self.starts[i + 1]
            if dy_NO is None:
                if du_NR is not None:
                    du_NR[:, start:end] = 0
                continue
            if du_NR is None and not self.wants[2][i]:
                continue
            dbs[i] = self.call.back_end.grad_up(
                dy_NO,
                None if self.u_NR is None else self.u_NR[:, start:end],
                self.lora_bs[i],
                self.call.scales[i],
                None if du_NR is None else du_NR[:, start:end],
                wants_b=self.wants[2][i],
            )
        return du_NR, dbs

    def _down(self, du_NR: torch.Tensor) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """dA of each member and the adapters' part of dx: one read of x for all."""
        a_RK, _ = _stacked(self.lora_as, self.call.back_end.RANK_STEP)
        x_NK = self.x_NK if any(self.wants[1]) else None
        da_RK, dx_NK = self.call.back_end.grad_down(x_NK, du_NR, a_RK, self.call.drop, wants_x=self.wants_x)
        das: list[torch.Tensor | None] = [None] * self.count
        for i, lora_a in enumerate(self.lora_as):
            if self.wants[1][i] and self.dys[i] is not None:
                das[i] = da_RK[self.starts[i] : self.starts[i] + len(lora_a)]
        return das, dx_NK


class Drop(torch.autograd.Function):
    """Dropout that draws its mask again instead of keeping it. apply(back_end, dropout, x)."""

    @staticmethod
    def forward(ctx: Any, back_end: ModuleType, dropout: Dropout, x: torch.Tensor) -> torch.Tensor:
        ctx.back_end, ctx.dropout = back_end, dropout
        with on_its_device(x.device):
            return back_end.drop(x.view(-1, x.shape[-1]), dropout).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        _refuse_second_derivative()
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        return None, None, ctx.back_end.drop(rows, ctx.dropout).view(gradient.shape)
