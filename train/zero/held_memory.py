"""What an engine keeps on the device between steps, by what it is for."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CONTAINERS = (list, tuple, set)


def held_bytes(module: nn.Module, optimizer: Any, device: torch.device) -> dict[str, int]:
    """Bytes of parameters, of optimizer state, and of gradients; memory that two tensors share counts once.

    DeepSpeed's optimizers keep their parts in lists and dicts of many names: what is called a gradient is one, and all
    else beside the parameters is state, fp32 masters too.
    """
    seen: set[int] = set()

    def fresh(tensors: Iterator[torch.Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == device.type and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    parameters = list(module.parameters())
    kept = list(_kept(optimizer, "", 0))
    return {
        "parameters": fresh(iter([*parameters, *_shards(parameters), *module.buffers()])),
        "gradients, buckets": fresh(iter([p.grad for p in parameters if p.grad is not None]))
        + fresh(tensor for name, tensor in kept if "grad" in name),
        "optimizer state": fresh(tensor for _, tensor in kept),
    }


def _shards(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """This rank's parts of parameters that ZeRO 3 has split."""
    return [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]


def _kept(value: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in an optimizer's attributes, with the attribute's name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth < 6:
        if isinstance(value, dict):
            inner = list(value.values())
        elif isinstance(value, CONTAINERS):
            inner = list(value)
        elif depth == 0 or isinstance(value, torch.optim.Optimizer):
            for key, part in vars(value).items():
                yield from _kept(part, key, depth + 1)
            return
        else:
            return
        for part in inner:
            yield from _kept(part, name, depth + 1)
