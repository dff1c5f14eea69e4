"""Greedy answers to many questions, shared out over the ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from tunesmith.train.data.order import rank_batches
from tunesmith.train.data.prepare import Question
from tunesmith.train.model.load import num_positions
from tunesmith.train.ranks.distributed import World, gather_floats
from tunesmith.train.zero.sharding import is_split


@torch.no_grad()
def answers(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    world: World,
    device: torch.device,
    batch_size: int,
    max_new_tokens: int,
    stop_ids: list[int],
    pad_token_id: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Token ids of the greedy answer to each question, without the end-of-turn token; the same list on every rank.

    Questions go longest first, so that a batch has little padding. Every rank must call it: under ZeRO 3 all ranks
    go forward together until the last one is done.
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt_ids))
    was_training = model.training
    model.eval()
    found = torch.full((len(questions), max_new_tokens), -1.0, dtype=torch.float64, device=device)
    batches = rank_batches(len(questions), batch_size, world)
    for number, batch in enumerate(batches):
        chosen = [order[i] if i >= 0 else order[0] for i in batch]
        new = _greedy(
            model, [questions[i].prompt_ids for i in chosen], device, max_new_tokens, stop_ids, pad_token_id, world
        )
        for place, index, row in zip(batch, chosen, new, strict=True):
            if place >= 0:
                found[index, : len(row)] = torch.tensor(row, dtype=torch.float64)
        if progress:
            progress(min(len(questions), (number + 1) * batch_size * world.world_size), len(questions))
    model.train(was_training)
    merged = gather_floats(found).view(world.world_size, *found.shape).amax(0)
    return [[int(token) for token in row if token >= 0] for row in merged.tolist()]


def _greedy(
    model: nn.Module,
    prompts: list[list[int]],
    device: torch.device,
    max_new_tokens: int,
    stop_ids: list[int],
    pad_token_id: int,
    world: World,
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with own_generation_config_only(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=room_for(model, width, max_new_tokens),
            eos_token_id=stop_ids,
            pad_token_id=pad_token_id,
            use_cache=True,
            synced_gpus=world.world_size > 1 and any(is_split(p) for p in model.parameters()),
        )
    return [_until_stop(row, set(stop_ids)) for row in output[:, width:].tolist()]


@contextmanager
def own_generation_config_only(model: Any) -> Iterator[None]:
    """Hides the model's generation_config: its sampling or repetition penalty would act on greedy answers too."""
    inner: Any = getattr(model, "base_model", None)  # PEFT keeps the configuration in both
    holders = [holder for holder in (model, inner) if hasattr(holder, "generation_config")]
    kept = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, kept, strict=True):
            holder.generation_config = config


def room_for(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """max_new_tokens, or fewer where the model has no more positions; at least one."""
    positions = num_positions(model.config)
    return max(1, min(max_new_tokens, positions - prompt_tokens)) if positions else max_new_tokens


def _until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:position]
    return tokens
