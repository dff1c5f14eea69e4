"""LoRA on a parameter instead of a layer, as on the experts of a block: the module runs with the sum in its place.

PEFT swaps the parameter for a parametrization in every forward and puts it back (0.21.2, ParamWrapper). Then a module
has other parameters while it runs, and ZeRO 3, which remembers the order in which it gathered them, finds another one
("tracing error"). Here the parameter stays where it is, and its sum with the LoRA matrices hides it for one forward.
"""

from typing import Any

import torch
from torch import nn

from tunesmith.train.zero.sharding import read_by


def use_plain_sums(model: nn.Module, *, sharded: bool) -> None:
    """Puts our forward on every LoRA layer that stands for a parameter; sharded: under ZeRO 3, before the engine."""
    from peft.tuners.lora.layer import ParamWrapper

    for module in model.modules():
        if isinstance(module, ParamWrapper):
            forward = _SumForward(module)
            module.forward = forward.forward
            if sharded:
                read_by(module, forward.parameters())


class _SumForward:
    """The forward of one LoRA layer on a parameter: [out, in], or a matrix an expert, [experts, ., .]."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._adapter = next(name for name in layer.active_adapters if name in layer.lora_A)
        self._peft_forward = layer.forward

    def parameters(self) -> list[nn.Parameter]:
        """What it reads of other modules, whose own forwards are not called or come later."""
        lora_a, lora_b = self.layer.lora_A[self._adapter], self.layer.lora_B[self._adapter]
        return [self.layer.get_param(), lora_a.weight, lora_b.weight]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if layer.disable_adapters or layer.merged_adapters or list(layer.active_adapters) != [self._adapter]:
            return self._peft_forward(x, *args, **kwargs)
        attributes = vars(layer.get_base_layer())  # come before parameters where a module looks for a name
        attributes[layer.parameter_name] = self._sum()
        try:
            return layer.base_layer(x, *args, **kwargs)
        finally:
            del attributes[layer.parameter_name]

    def _sum(self) -> torch.Tensor:
        parameter, lora_a, lora_b = self.parameters()
        if parameter.ndim == 2:
            return torch.addmm(parameter, lora_b, lora_a, alpha=self.layer.scaling[self._adapter])
        left, right, scaling = self.layer.get_delta_factors(self._adapter)
        return torch.baddbmm(parameter, left, right, alpha=scaling)
