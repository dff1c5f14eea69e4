"""RMSNorm, rotary embedding and gated MLP of a model on our kernels; modules, their names and what is saved stay.

A module's `forward` is replaced on the instance: hooks, ZeRO 3's among them, go on as they are, and projections are
called as modules, whatever LoRA has made of them. What is asked of a replaced forward beyond the plain case (another
dtype, autocast, more arguments) goes to the model's own. No model is known by name: block_formulas.py asks the modules.
The sum with the residual stream stays the model's: only a decoder layer's own forward knows of it.
"""

import types
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.glu.glu import glu, glu_packed
from tunesmith.kernels.leaf_backend import Backend, is_autocast
from tunesmith.kernels.rms_norm.rms_norm import rms_norm
from tunesmith.kernels.rope.rope import rope
from tunesmith.train.config.config import Kernels
from tunesmith.train.model.block_formulas import NormFormula, glu_activation, norm_formula, rope_angles
from tunesmith.train.zero.sharding import full_shape

ROPE = "apply_rotary_pos_emb"  # the name by which the attention of a model of transformers calls it
MLPS = {"mlp": {"gate_proj", "up_proj", "down_proj"}, "packed mlp": {"gate_up_proj", "down_proj"}}  # by their children
ACTIVATION_NAMES = {"act_fn", "activation_fn"}
# Against transformers' own modules on one core of a CPU, process time of forward and backward in turns: a norm takes
# 1.4 times as long at 1,024 elements, 1.05 at 32,768, 0.9 at 65,536, 0.3 at 400,000; a rotation 1.1 at 16,384 of q, 0.9
# at 131,072, 0.5 at 262,144; the activation, which costs more to compute again than to keep, 1.5 to 2.7 times.
CPU_LEAST_ELEMENTS = 2**16  # of a norm's input, and of q
GLU_ON_CPU = False


def use_block_kernels(model: nn.Module, kernels: Kernels, device: torch.device) -> list[str]:
    """Puts our forward on what our kernels compute; says in words what looks alike and is left as it is.

    device: of the training; the model may still be on the CPU. Call it before the engine is made.
    """
    if kernels is Kernels.off:
        return []
    backend: Backend = "torch" if kernels is Kernels.torch else "auto"  # triton where x is on a GPU
    on_cpu = device.type == "cpu" and kernels is Kernels.torch
    left: dict[tuple[str, str], int] = defaultdict(int)
    ask = _Asked(model, backend, least_elements=CPU_LEAST_ELEMENTS if on_cpu else 0)
    for module in model.modules():
        kind = None if "forward" in vars(module) else _kind(module)
        if kind is None or (kind in MLPS and on_cpu and not GLU_ON_CPU):
            continue
        forward = ask.forward_of(module, kind)
        if isinstance(forward, str):
            left[type(module).__name__, forward] += 1
        else:
            module.forward = forward
    return [
        f"{count} x {name}: transformers' own forward, not our kernels: {why}" for (name, why), count in left.items()
    ]


def _kind(module: nn.Module) -> str | None:
    """What a module looks like: norm, mlp, packed mlp, rotation; None for anything else."""
    children = set(dict(module.named_children()))
    if not children and set(module._parameters) == {"weight"} and any("eps" in name for name in vars(module)):
        return "norm" if module.weight is not None and len(full_shape(module.weight)) == 1 else None  # type: ignore[arg-type]
    for kind, names in MLPS.items():
        if names <= children and children - names <= ACTIVATION_NAMES and not module._parameters:
            return kind
    return "rotation" if _rotation_of(module) else None


def _rotation_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function by which a module's forward rotates queries and keys."""
    forward: Any = type(module).forward
    if not isinstance(forward, types.FunctionType) or ROPE not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(ROPE)


class _Asked:
    """The forwards for the modules of one model; modules that are alike are asked once."""

    def __init__(self, model: nn.Module, backend: Backend, least_elements: int) -> None:
        self._backend, self._least_elements = backend, least_elements
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        # Each holds an angle for two of the features that are rotated.
        self._rotated = {2 * it.numel() for name, it in model.named_buffers() if "inv_freq" in name}
        self._known: dict[Any, Any] = {}
        self._rotating = cache(self._make_rotating)

    def forward_of(self, module: nn.Module, kind: str) -> Callable[..., Any] | str:
        """What to put in place of its forward, or why not."""
        if kind == "rotation":
            return self._attention(module)
        if kind == "norm":
            weight: Any = module.weight
            formula = self._once(module, norm_formula, (full_shape(weight), weight.dtype))
            if formula is None:
                return "it is no RMSNorm that they know"
            return _Norm(module, formula, self._backend, self._least_elements).forward
        if any(child._forward_hooks or child._forward_pre_hooks for child in _activations(module)):
            return "hooks on its activation would not run"
        activation = self._once(
            module, lambda it: glu_activation(it, packed=kind == "packed mlp"), _activations(module)
        )
        if not activation:
            return "it is no activation(gate) * up that they know"
        return (_PackedMlp if kind == "packed mlp" else _Mlp)(module, activation, self._backend).forward

    def _once(self, module: nn.Module, ask: Callable[[nn.Module], Any], more: Any) -> Any:
        own = {name: it for name, it in vars(module).items() if name not in vars(nn.Module())}
        plain = {name: it if isinstance(it, int | float | str | tuple | None) else id(it) for name, it in own.items()}
        key = (type(module), repr(plain), repr(more))
        if key not in self._known:
            self._known[key] = ask(module)
        return self._known[key]

    def _attention(self, module: Any) -> Callable[..., Any] | str:
        head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)  # of GPT-NeoX
        if self._rotated and head_dim and head_dim not in self._rotated:
            return f"it rotates a part of its {head_dim} features"
        forward = self._rotating(type(module).forward)
        return types.MethodType(forward, module) if forward else f"its {ROPE} is no rotation that they know"

    def _make_rotating(self, theirs: Any) -> Callable[..., Any] | None:
        """The same code with our rotation under the name by which it calls its own."""
        rotation = theirs.__globals__[ROPE]
        angles = rope_angles(rotation, self._dtype)
        if not angles:
            return None
        names = {**theirs.__globals__, ROPE: _rotation(rotation, angles, self._backend, self._least_elements)}
        ours = types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
        ours.__kwdefaults__ = theirs.__kwdefaults__
        return ours


def _activations(module: nn.Module) -> list[nn.Module]:
    return [child for name, child in module.named_children() if name in ACTIVATION_NAMES]


def _rotation(
    theirs: Callable[..., Any], angles: frozenset[torch.dtype], backend: Backend, least_elements: int
) -> Callable[..., Any]:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        plain = q.numel() >= least_elements and not (args or kwargs) and q.ndim == 4 and not is_autocast(q.device)
        angled = plain and cos.shape in (q[:, 0].shape, q[:1, 0].shape) and not cos.requires_grad
        if angled and cos.dtype in angles and q.dtype == k.dtype:
            return rope(q, k, cos, sin, backend=backend)
        return theirs(q, k, cos, sin, *args, **kwargs)

    return rotate


class _Norm:
    """The forward of one RMSNorm."""

    def __init__(self, module: nn.Module, formula: NormFormula, backend: Backend, least_elements: int) -> None:
        self._module: Any = module
        self._theirs = module.forward
        self._formula, self._backend, self._least_elements = formula, backend, least_elements

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weight, form = self._module.weight, self._formula
        if (
            x.numel() < self._least_elements
            or args
            or kwargs
            or x.dtype != weight.dtype
            or x.shape[-1:] != weight.shape
            or is_autocast(x.device)
        ):
            return self._theirs(x, *args, **kwargs)
        eps = getattr(self._module, form.eps)
        return rms_norm(x, weight, eps, one_plus=form.one_plus, round_first=form.round_first, backend=self._backend)


class _Mlp:
    """The forward of one MLP of three projections."""

    def __init__(self, module: nn.Module, activation: str, backend: Backend) -> None:
        self._module: Any = module
        self._theirs = module.forward
        self._activation, self._backend = activation, backend

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or is_autocast(x.device):
            return self._theirs(x, *args, **kwargs)
        return self._module.down_proj(self.gated(x))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return glu(self._module.gate_proj(x), self._module.up_proj(x), self._activation, backend=self._backend)


class _PackedMlp(_Mlp):
    """The forward of one MLP whose gate and up projections are one."""

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return glu_packed(self._module.gate_up_proj(x), self._activation, backend=self._backend)
