"""Gated linear units in plain torch: what the Triton kernels are held against."""

import torch
import torch.nn.functional as F

aten = torch.ops.aten


def _activated(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def forward(gate_NF: torch.Tensor, up_NF: torch.Tensor, y_NF: torch.Tensor, activation: str) -> None:
    """Fills y."""
    wide = torch.promote_types(gate_NF.dtype, torch.float32)
    y_NF.copy_(_activated(gate_NF.to(wide), activation).mul_(up_NF))


def backward(
    dy_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    dgate_NF: torch.Tensor,
    dup_NF: torch.Tensor,
    activation: str,
) -> None:
    """Fills the gradients of gate and up."""
    wide = torch.promote_types(gate_NF.dtype, torch.float32)
    gate_NF = gate_NF.to(wide)
    dup_NF.copy_(_activated(gate_NF, activation).mul_(dy_NF))
    upstream_NF = dy_NF.to(wide) * up_NF
    if activation == "silu":
        dgate_NF.copy_(aten.silu_backward(upstream_NF, gate_NF))
    else:
        form = "tanh" if activation == "gelu_tanh" else "none"
        dgate_NF.copy_(aten.gelu_backward(upstream_NF, gate_NF, approximate=form))
