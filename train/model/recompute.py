"""Blocks that compute their activations again in the backward instead of keeping them: a share, evenly spread."""

from typing import Any

from tunesmith.train.errors import ModelError
from tunesmith.train.model.adapter import transformer_blocks


def chosen_blocks(recomputed: int, num_blocks: int) -> list[bool]:
    """Which blocks recompute, so many of all, evenly spread."""
    return [(at + 1) * recomputed // num_blocks > at * recomputed // num_blocks for at in range(num_blocks)]


def possible_numbers(model: Any) -> list[int]:
    """How many of a model's blocks can recompute: any number, all or none, or none."""
    blocks = transformer_blocks(model)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return [0]
    return list(range(len(blocks) + 1)) if all(map(_chooses, blocks)) else [0, len(blocks)]


def _chooses(block: Any) -> bool:
    return hasattr(block, "gradient_checkpointing")


def recompute_blocks(model: Any, share: float) -> None:
    """Has a share of a model's blocks keep their input alone, and compute the rest again in the backward.

    Raises ModelError when only some are to, and the model's code knows none or all.
    """
    if not share:
        return
    # transformers 5.23 has the new name and warns of the old one; earlier releases have only the old.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    blocks: Any = transformer_blocks(model)
    for block, again in zip(blocks, chosen_blocks(round(share * len(blocks)), len(blocks)), strict=True):
        if not again and not _chooses(block):
            raise ModelError(
                f"the blocks of {type(model).__name__} recompute all or none.",
                at="memory.recompute",
                do="set memory=recompute or memory=keep.",
            )
        if not again:
            block.gradient_checkpointing = False
