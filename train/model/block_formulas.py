"""Which of our formulas a module of a model computes, found out by asking it, not by its name.

A twin of the module's class with small known numbers must agree with a formula, in values and gradients, to rounding.
None comes back where it agrees with none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.glu.glu import ACTIVATIONS, glu, glu_packed
from tunesmith.kernels.rms_norm.rms_norm import rms_norm
from tunesmith.kernels.rope.rope import rope
from tunesmith.train.zero.sharding import full_shape

# Relative difference in float32. Rounding comes to 1e-6 and less; the nearest two formulas, the forms of GELU, to 3e-4.
TOLERANCE = 1e-5
SAME_BITS = 0.99  # of results in 16 bits: rounding in another place changes a quarter of them and more
SCALES = 1e-4, 1e-2, 1.0, 10.0, 100.0  # of the rows that are asked with: eps counts at the first, a clamp at the last
TWIN_SIZES = 16, 24  # hidden and feed-forward features of a twin
DTYPES = torch.bfloat16, torch.float16, torch.float32

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class NormFormula:
    """What rms_norm() is told for a module."""

    eps: str  # the module's attribute
    one_plus: bool
    round_first: bool


def norm_formula(module: nn.Module) -> NormFormula | None:
    """Of a module whose one parameter is a vector."""
    weight: Any = module.weight
    (features,) = full_shape(weight)
    found = [name for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if len(found) != 1 or weight.dtype not in DTYPES:
        return None
    eps = float(vars(module)[found[0]])
    with _asking():
        twin: Any = _twin(module)
        drawn = 1 + torch.randn(features) / 2
        x = torch.randn(len(SCALES), features) * torch.tensor(SCALES)[:, None]
        for one_plus in (False, True):
            twin.weight = nn.Parameter(drawn)
            if not _agree(
                twin, lambda x, form=one_plus: rms_norm(x, twin.weight, eps, one_plus=form, backend="torch"), [x]
            ):
                continue
            twin.weight = nn.Parameter(drawn.to(weight.dtype))
            x = x[2:].to(weight.dtype)  # within the range of float16
            for round_first in (True, False):
                form = {"one_plus": one_plus, "round_first": round_first}
                ours = rms_norm(x, twin.weight, eps, backend="torch", **form)
                if float((twin(x) == ours).float().mean()) >= SAME_BITS or weight.dtype is torch.float32:
                    return NormFormula(found[0], one_plus, round_first)
    return None


def glu_activation(module: nn.Module, *, packed: bool) -> str | None:
    """Of an MLP of gate_proj, up_proj and down_proj, or packed: gate_up_proj, gate first, and down_proj."""
    hidden, wide = TWIN_SIZES
    with _asking():
        twin: Any = _twin(module)
        for name, child in module.named_children():
            twin.add_module(name, child)  # the activation; the others are replaced
        twin.down_proj = nn.Linear(wide, hidden, bias=False)
        for name in ("gate_up_proj",) if packed else ("gate_proj", "up_proj"):
            setattr(twin, name, nn.Linear(hidden, 2 * wide if packed else wide, bias=False))

        def ours(x: torch.Tensor, activation: str) -> torch.Tensor:
            if packed:
                return twin.down_proj(glu_packed(twin.gate_up_proj(x), activation, backend="torch"))
            return twin.down_proj(glu(twin.gate_proj(x), twin.up_proj(x), activation, backend="torch"))

        x = torch.randn(len(SCALES), hidden) * torch.tensor(SCALES)[:, None]
        return next((it for it in ACTIVATIONS if _agree(twin, partial(ours, activation=it), [x])), None)


def rope_angles(function: Callable[..., Any], dtype: torch.dtype) -> frozenset[torch.dtype]:
    """The dtypes of cos and sin with which a function (q, k, cos, sin) is rope() on q and k of a dtype."""
    agreed = set()
    with _asking():
        q, k = torch.randn(2, 3, 4, 5, 8).unbind(0)  # [3, 4, 5, 8]
        cos, sin = torch.randn(2, 3, 5, 8).unbind(0)
        if dtype in DTYPES and _agree(function, partial(rope, backend="torch"), [q, k], cos, sin):
            for angles in {dtype, torch.float32}:
                given = q.to(dtype), k[:, :2].to(dtype), cos.to(angles), sin.to(angles)
                if [it.dtype for it in function(*given)] == [dtype, dtype]:
                    agreed.add(angles)
    return frozenset(agreed)


@contextmanager
def _asking() -> Iterator[None]:
    """Inside, numbers are the same each time and on the CPU, and the run's own random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        yield


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class with the same plain attributes, without parameters and submodules."""
    twin: nn.Module = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    vars(twin).update({name: value for name, value in vars(module).items() if name not in vars(twin)})
    return twin


def _agree(theirs: Callable[..., Any], ours: Callable[..., Any], inputs: list[torch.Tensor], *more: Any) -> bool:
    """Whether values and gradients are the same to rounding, row by row. Whatever theirs raises is a no."""
    results: list[Tensors] = []
    try:
        for function in (theirs, ours):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            given = function(*leaves, *more)
            outputs = given if isinstance(given, tuple) else (given,)
            upstream = [torch.linspace(-1, 2, output.numel()).view(output.shape) for output in outputs]
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, upstream)))
        return all(
            float(((a - b).norm(dim=-1) / b.norm(dim=-1)).detach().max()) < TOLERANCE
            for a, b in zip(*results, strict=True)
        )
    except Exception:  # whatever a module makes of arguments that it was not written for
        return False
