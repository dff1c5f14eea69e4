"""What lora_linear refuses, in words with names and numbers."""

from collections.abc import Sequence

import torch

DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64


def check(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    lora_as: Sequence[torch.Tensor],
    lora_bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    biases: Sequence[torch.Tensor | None],
    transposed: bool,
) -> None:
    """Raises ValueError when the arguments of a group do not fit each other."""
    lengths = [len(given) for given in (weights, lora_as, lora_bs, scalings, biases)]
    if not weights or len(set(lengths)) != 1:
        names = "weights, lora_as, lora_bs, scalings, biases"
        raise ValueError(f"{names} have {', '.join(map(str, lengths))} entries, not one for each layer.")
    if x.ndim < 1 or not x.is_contiguous() or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be contiguous, [..., K], of bfloat16, float16, float32 or float64; it is {x.dtype} "
            f"{list(x.shape)} with strides {list(x.stride())}."
        )
    for i, group in enumerate(zip(weights, lora_as, lora_bs, biases, strict=True)):
        which = f"[{i}]" if len(weights) > 1 else ""
        _check_layer(x, *group, transposed, which)


def _check_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    which: str,
) -> None:
    stored = "[K, O]" if transposed else "[O, K]"
    if weight.ndim != 2:
        raise ValueError(
            f"weight{which} has shape {list(weight.shape)}, not {stored}: a flat or empty weight is a shard that must "
            f"be gathered first, a packed one must be dequantized."
        )
    in_features, out_features = weight.shape if transposed else reversed(weight.shape)
    rank = lora_a.shape[0] if lora_a.ndim == 2 else 0
    wanted = {"lora_a": (lora_a, [rank, in_features]), "lora_b": (lora_b, [out_features, rank])}
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features and weight{which}, {stored}, takes {in_features}.")
    for name, (matrix, shape) in wanted.items():
        if list(matrix.shape) != shape or 0 in shape:
            raise ValueError(
                f"{name}{which} has shape {list(matrix.shape)}, not {'[r, K]' if name == 'lora_a' else '[O, r]'}: "
                f"weight{which} has K={in_features}, O={out_features} and lora_a{which} has r={rank}."
            )
        if not matrix.is_contiguous():
            raise ValueError(f"{name}{which} must be contiguous; its strides are {list(matrix.stride())}.")
        check_like(x, f"{name}{which}", matrix)
    check_like(x, f"weight{which}", weight)
    if bias is not None:
        check_like(x, f"bias{which}", bias)
        if list(bias.shape) != [out_features] or not bias.is_contiguous():
            raise ValueError(f"bias{which} has shape {list(bias.shape)}, not [{out_features}] and contiguous.")


def check_like(x: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless a tensor has the dtype and the device of x."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, and x is {x.dtype} on {x.device}: convert one to the other."
        )
