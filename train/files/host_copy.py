"""A copy of a tree of tensors in host memory, which training leaves as it is."""

import copy
from typing import Any

import torch
from torch import nn

Copies = dict[tuple[str, int], tuple[torch.Tensor, torch.UntypedStorage]]


def host_copy(tree: Any) -> Any:
    """Tensors that share memory share it in the copy too; from a GPU they go to pinned memory, all at once."""
    copies: Copies = {}
    copied = _copied(tree, copies)
    if any(device.startswith("cuda") for device, _ in copies):
        torch.cuda.synchronize()  # the copies were only asked for
    return copied


def _copied(value: Any, copies: Copies) -> Any:
    if isinstance(value, torch.Tensor):
        return _copied_tensor(value, copies)
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, dict):
        empty = copy.copy(value)  # an OrderedDict stays one
        empty.clear()
        empty.update((key, _copied(inner, copies)) for key, inner in value.items())
        return empty
    if isinstance(value, list):
        return [_copied(inner, copies) for inner in value]
    if type(value) is tuple:
        return tuple(_copied(inner, copies) for inner in value)
    return copy.deepcopy(value)


def _copied_tensor(tensor: torch.Tensor, copies: Copies) -> torch.Tensor:
    source = tensor.untyped_storage()
    key = (str(tensor.device), source.data_ptr())
    if key not in copies or source.nbytes() == 0:
        on_gpu = tensor.device.type == "cuda"
        target = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
        bytes_there = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(source)
        target.copy_(bytes_there, non_blocking=on_gpu)
        # The source is held until all is copied: its memory, given to another tensor meanwhile, would be taken for it.
        copies[key] = (target, source)
    storage = copies[key][0].untyped_storage()
    copied = torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad)
