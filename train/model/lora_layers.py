"""PEFT's LoRA layers computed by our kernels; the modules, their names and what is saved stay PEFT's.

A layer's `forward` is replaced on the instance. Whatever the kernels do not cover, and whatever PEFT is asked for
beyond one active adapter, goes through PEFT's own forward. q/k/v and gate/up projections that get the same tensor are
computed together, and then share one dropout mask; PEFT draws one for each.
"""

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.lora.lora_linear import dora_linear, lora_linear, lora_linear_group
from tunesmith.train.config.config import Kernels
from tunesmith.train.model.lora_parameters import use_plain_sums
from tunesmith.train.zero.sharding import read_by

GROUPS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # children of one module that read the same tensor
MAX_SEED = 2**63 - 1


def use_lora_kernels(model: nn.Module, kernels: Kernels, *, sharded: bool) -> list[str]:
    """Puts our forward on every LoRA layer of a model that it covers; says in words what is left to PEFT, and why.

    sharded: under ZeRO 3, where the weights that a layer reads are gathered for it. There each layer is computed alone:
    DeepSpeed hands every module its own copy of the tensor, so that nothing shows that q, k and v read the same.
    Call it before the engine is made.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    use_plain_sums(model, sharded=sharded)
    if kernels is Kernels.off:
        return []
    left: dict[str, list[str]] = defaultdict(list)
    replaced: dict[nn.Module, _LoraForward] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        why_not = why_left_to_peft(module)
        if why_not and not isinstance(module, ParamWrapper):  # which is a sum already
            left[why_not].append(name)
        if why_not:
            continue
        replaced[module] = _LoraForward(module, kernels)
        module.forward = replaced[module].forward
        if sharded:
            read_by(module, replaced[module].foreign_parameters())
    if not sharded:
        for parent in model.modules():
            _group(parent, replaced)
    return [f"LoRA on {_listed(names)} runs through PEFT: {why_not}" for why_not, names in left.items()]


def why_left_to_peft(layer: Any) -> str | None:
    """Why PEFT's own forward must compute a LoRA layer, in words; None where the kernels can."""
    from peft.tuners.lora.layer import Linear, ParamWrapper
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

    base = layer.base_layer
    # LoRA on the weight of a linear layer is LoRA on the layer (targets.py says where it is asked for so).
    if not (type(layer) is Linear and type(base) in (nn.Linear, Conv1D)) and not (
        type(layer) is ParamWrapper and type(base) is nn.Linear and layer.parameter_name == "weight"
    ):
        return f"the base layer is {type(base).__name__}, not Linear"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active, not one"
    adapter = active[0]
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"{type(variant).__name__.removesuffix('LinearVariant')} is a variant our kernels do not know"
    if layer.lora_bias.get(adapter):
        return "lora_B has a bias"
    if type(layer.lora_dropout[adapter]) not in (nn.Identity, nn.Dropout):
        return f"its dropout is {type(layer.lora_dropout[adapter]).__name__}"
    inner = (base, layer.lora_A[adapter], layer.lora_B[adapter])
    if any(module._forward_hooks or module._forward_pre_hooks for module in inner):
        return "hooks inside it would not run"
    dtypes = {parameter.dtype for module in inner for parameter in module.parameters()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        return f"its weights are of {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
    return None


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, such as {names[0]},"


def _group(parent: nn.Module, replaced: "dict[nn.Module, _LoraForward]") -> None:
    """Lets the children of a module that read one tensor find each other while its forward runs."""
    children = dict(parent.named_children())
    for names in GROUPS:
        members = [replaced[children[name]] for name in names if name in children and children[name] in replaced]
        members = [member for member in members if member.magnitude is None and not member.transposed]
        if len(members) > 1:
            group = _Group(members)
            parent.register_forward_pre_hook(group.open)
            parent.register_forward_hook(group.close, always_call=True)


class _LoraForward:
    """The forward of one LoRA layer."""

    def __init__(self, layer: Any, kernels: Kernels) -> None:
        self.layer = layer
        self.backend: Any = "torch" if kernels is Kernels.torch else "auto"  # triton where x is on a GPU
        self.group: _Group | None = None
        self._peft_forward = layer.forward
        self._adapter = next(name for name in layer.active_adapters if name in layer.lora_A)
        self.transposed = type(layer.base_layer) is not nn.Linear
        self._has_warned = False

    @property
    def weight(self) -> nn.Parameter:
        return self.layer.base_layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.layer.base_layer.bias

    @property
    def lora_a(self) -> nn.Parameter:
        return self.layer.lora_A[self._adapter].weight

    @property
    def lora_b(self) -> nn.Parameter:
        return self.layer.lora_B[self._adapter].weight

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's, else None."""
        magnitudes = self.layer.lora_magnitude_vector
        return magnitudes[self._adapter].weight if self._adapter in magnitudes else None

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self._adapter])

    @property
    def dropout_p(self) -> float:
        """Of this forward: 0 outside training."""
        dropout = self.layer.lora_dropout[self._adapter]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def foreign_parameters(self) -> list[nn.Parameter]:
        """What this layer's forward reads of its submodules, whose own forwards are not called."""
        found = (self.weight, self.bias, self.lora_a, self.lora_b, self.magnitude)
        return [parameter for parameter in found if parameter is not None]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.can_take(x):
            return self._peft_forward(x, *args, **kwargs)
        result = self.group.result(self, x) if self.group else None
        return self.alone(x) if result is None else result

    def can_take(self, x: torch.Tensor) -> bool:
        """False where PEFT was asked for something else since: no adapter, a merged one, another one, other dtypes."""
        layer = self.layer
        if layer.disable_adapters or layer.merged_adapters or list(layer.active_adapters) != [self._adapter]:
            return False
        dtypes = {x.dtype, *(parameter.dtype for parameter in self.foreign_parameters())}
        if len(dtypes) == 1 and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            return True
        if not self._has_warned:
            self._has_warned = True
            given = "autocast" if len(dtypes) == 1 else f"dtypes {', '.join(sorted(map(str, dtypes)))}"
            warnings.warn(
                f"a LoRA layer met {given}: it runs through PEFT there, not our kernels, which is as right but slower; "
                "keep weights and inputs in one dtype, without autocast",
                stacklevel=2,
            )
        return False

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = {"bias": self.bias, "transposed": self.transposed, "backend": self.backend}
        arguments |= {"dropout_p": self.dropout_p, "seed": draw_seed(self.dropout_p)}
        tensors = x.contiguous(), self.weight, self.lora_a, self.lora_b
        if self.magnitude is not None:
            return dora_linear(*tensors, self.magnitude, self.scaling, **arguments)
        return lora_linear(*tensors, self.scaling, **arguments)


class _Group:
    """Layers that may be given the same tensor within one forward of their parent, computed together when they are.

    The first one called computes all; another takes its result if it is called with the very same tensor, unchanged.
    Anything else computes alone, so grouping never decides what comes out.
    """

    def __init__(self, members: list[_LoraForward]) -> None:
        self._members = members
        self._is_open = False
        self._key: tuple[Any, ...] | None = None
        self._results: dict[_LoraForward, torch.Tensor] = {}
        for member in members:
            member.group = self

    def open(self, *_: Any) -> None:
        self._is_open, self._key = True, None
        self._results.clear()

    def close(self, *_: Any) -> None:
        self._is_open, self._key = False, None
        self._results.clear()

    def result(self, member: _LoraForward, x: torch.Tensor) -> torch.Tensor | None:
        """A member's output for x; None where it has to compute alone."""
        if not self._is_open or x.is_inference():  # such a tensor does not count the changes made to it
            return None
        if self._key is None:
            if not self._agree(x):
                return None
            self._key = self._now(x)
            self._results = dict(zip(self._members, self._together(x), strict=True))
        held, *rest = self._key
        now, *state = self._now(x)
        return self._results.pop(member, None) if held is now and rest == state else None

    def _now(self, x: torch.Tensor) -> tuple[Any, ...]:
        return x, x._version, torch.is_grad_enabled()

    def _agree(self, x: torch.Tensor) -> bool:
        ready = all(member.can_take(x) for member in self._members)
        return ready and len({member.dropout_p for member in self._members}) == 1

    def _together(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        members, dropout_p = self._members, self._members[0].dropout_p
        return lora_linear_group(
            x.contiguous(),
            [member.weight for member in members],
            [member.lora_a for member in members],
            [member.lora_b for member in members],
            [member.scaling for member in members],
            biases=[member.bias for member in members],
            dropout_p=dropout_p,
            seed=draw_seed(dropout_p),
            backend=members[0].backend,
        )


def draw_seed(dropout_p: float) -> int | None:
    """A seed for one forward, of torch's CPU generator: a recomputation and a resumed run draw the same one again.

    None without dropout, which must not move the generator.
    """
    return int(torch.randint(MAX_SEED, ())) if dropout_p else None
