"""Weights that hold inf or NaN, found while a model is loaded: later they are only logits that do not fit."""

from collections.abc import Iterable

import torch
from torch import nn

from tunesmith.train.errors import ModelError
from tunesmith.train.ranks.distributed import World, sum_over_ranks
from tunesmith.train.zero.sharding import full_shape, own_part

PIECE = 2**20  # elements


@torch.no_grad()
def check_finite(model: nn.Module, name: str, world: World, device: torch.device) -> None:
    """Raises ModelError, on all ranks, when a parameter or persistent buffer is not finite. Every rank of the world
    calls it, and looks at its share of each, whether ZeRO 3 has split it or not.
    """
    persistent = set(model.state_dict())
    held = [*model.named_parameters(), *((key, it) for key, it in model.named_buffers() if key in persistent)]
    held = [(key, tensor) for key, tensor in held if tensor.is_floating_point()]
    found = torch.zeros(len(held), 2, dtype=torch.int64, device=device)  # NaN, inf
    for index, (_, tensor) in enumerate(held):
        _, part = own_part(tensor, world)  # type: ignore[arg-type]
        for piece in _readable(part):
            low, high = torch.aminmax(piece)  # NaN where one is; needs no memory, and is 40 times as fast as isfinite()
            found[index] |= torch.stack([low.isnan(), low.isinf() | high.isinf()]).to(found)
    sums = (sum_over_ranks(found) if world.world_size > 1 else found).tolist()  # rank 0 opens a finished model alone
    bad = [(*which, num_nan) for which, (num_nan, num_inf) in zip(held, sums, strict=True) if num_nan or num_inf]
    if not bad:
        return
    key, tensor, num_nan = bad[0]
    others = f" (the first of {len(bad)} such weights)" if len(bad) > 1 else ""
    over = "set engine.precision=bf16 if these numbers are only too large for fp16 (above 65504); else "
    raise ModelError(
        f"{key} {list(full_shape(tensor))} of {name} is not finite: it holds {'NaN' if num_nan else 'inf'}{others}.",
        at="model.name_or_path",
        do=f"{over if tensor.dtype is torch.float16 else ''}get its files anew: nothing can be learned from there.",
    )


def _readable(part: torch.Tensor) -> Iterable[torch.Tensor]:
    """The elements in a dtype that torch compares in: float8, in which a quantized model stays, a piece at a time."""
    if not part.numel():
        return ()
    return (part,) if part.dtype.itemsize > 1 else (piece.to(torch.bfloat16) for piece in part.split(PIECE))
