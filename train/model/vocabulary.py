"""A tokenizer with more ids than the model has rows: a run that uses one is refused before weights are loaded, or given
rows on request.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from tunesmith.train.config.config import AdapterKind, Config
from tunesmith.train.data.prepare import PreparedData
from tunesmith.train.data.render import stop_token_ids
from tunesmith.train.errors import ModelError
from tunesmith.train.ranks.distributed import World
from tunesmith.train.zero.sharding import full_shape, gathered, is_split, sharded_init


def check_rows(config: Config, hf_config: Any, tokenizer: Any, data: PreparedData, note: Callable[[str], None]) -> None:
    """Raises ModelError unless every id that the run uses has a row in the model, or is to be given one and trained.

    Ids of the tokenizer beyond the rows that neither the data nor padding nor the end of an answer uses are only noted.
    """
    num_rows: int = getattr(hf_config.get_text_config(), "vocab_size", None) or 2**62
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= num_rows}
    if not beyond:
        return
    adapter, resized = config.adapter.kind, config.model.resize_embeddings
    used = beyond if resized else {index: beyond[index] for index in _used_beyond(num_rows, tokenizer, data)}
    shown = sorted((used or beyond).items())
    named = ", ".join(repr(token) for _, token in shown[:3])
    named = f"{named} and {len(shown) - 3} more" if len(shown) > 3 else named
    what = (
        f"the tokenizer of {config.model.name_or_path} has ids up to {max(beyond)}, the model {num_rows} rows: {named}"
    )
    if not used:
        note(f"{what} would be looked up beyond them, but this run has no such token.")
    elif not resized:
        raise ModelError(
            f"{what} would be looked up beyond them.",
            at="model.name_or_path",
            do=f"take these tokens out of the tokenizer, or set model.resize_embeddings=true and adapter=none: "
            f"{max(beyond) + 1 - num_rows} rows are added then, and trained.",
        )
    elif adapter is not AdapterKind.none:
        raise ModelError(
            f"{what} would get rows that adapter={adapter} neither trains nor saves: the embedding is frozen there.",
            at="model.resize_embeddings",
            do="set adapter=none, or take these tokens out of the tokenizer.",
        )


def _used_beyond(num_rows: int, tokenizer: Any, data: PreparedData) -> set[int]:
    """Ids without a row among those of the data, the padding and what ends an answer."""
    used = {tokenizer.pad_token_id, *stop_token_ids(tokenizer)}
    for split in (data.train, data.validation):
        if split is not None and split.tokens.max() >= num_rows:  # which needs no memory
            used.update(split.tokens[split.tokens >= num_rows].tolist())
    return {index for index in used if index >= num_rows}


def num_ids(tokenizer: Any) -> int:
    """Rows that a model needs for a tokenizer: one more than its highest id."""
    return 1 + max(tokenizer.get_vocab().values())


class _Rows(nn.Module):
    """Holds one parameter, which ZeRO 3 splits when this is made."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.empty(shape, dtype=dtype))


def add_rows(model: Any, num_rows: int, config: Config, world: World) -> None:
    """Gives embedding and output head at least this many rows; new ones are the mean of the old. Every rank calls it.

    It leaves the likelihoods of all other tokens almost as they are (nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if full_shape(embedding.weight)[0] >= num_rows:
        return
    grown: dict[int, nn.Parameter] = {}  # by the parameter before: a tied head keeps sharing it
    for module in (embedding, head):
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in grown:
                grown[id(old)] = _grown(old, num_rows, config, world)
            setattr(module, name, grown[id(old)])
    embedding.num_embeddings = head.out_features = num_rows
    model.config.get_text_config().vocab_size = model.vocab_size = num_rows


@torch.no_grad()
def _grown(old: nn.Parameter, num_rows: int, config: Config, world: World) -> nn.Parameter:
    num_old, *rest = full_shape(old)
    with sharded_init(config, world) if is_split(old) else nullcontext():
        new = _Rows((num_rows, *rest), old.dtype).parameter
    with gathered([old, new], write=True):
        new[:num_old] = old
        new[num_old:] = old.mean(0, dtype=torch.float32).to(old.dtype)
    return new
