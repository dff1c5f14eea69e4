"""Attention of packed records without a mask, put into transformers' own models by name.

transformers asks two tables by config._attn_implementation: one for a mask, once a forward and kind of layer, one for
the attention of each layer. Ours answers with the segments of the batch in place of a mask, which the model hands on to
its layers, and a layer that gets segments computes inside them (kernels/attention/). In the backward of a checkpointed
layer they are still at hand. Where no segments are offered, as while answers are generated, or a layer sees more than
what lies before a token, the mask and the attention are those that the model has anyway.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.kernels.attention.segment_attention import segment_attention
from tunesmith.kernels.attention.segments import Segments

# What a model has without us -> the name of ours with it; transformers gives names with "sdpa" or "flash" a meaning.
NAMES = {"sdpa": "tunesmith", "eager": "tunesmith_eager"}
_MASKS = {"sdpa": masking_utils.sdpa_mask, "eager": masking_utils.eager_mask}
# Mask functions of transformers that say no more than: tokens before this one, in its record, in the window.
_KNOWN = {
    f"{name}.<locals>.inner_mask"
    for name in ("sliding_window_overlay", "packed_sequence_mask_function", "remap_positions_for_packed_sequence")
} | {"causal_mask_function", "and_masks.<locals>.and_mask"}

_offered: Segments | None = None  # of the forward that runs now


@contextmanager
def offering(segments: Segments | None) -> Iterator[None]:
    """Inside, forwards of models that use_segments() was called on are of these segments."""
    global _offered
    before, _offered = _offered, segments
    try:
        yield
    finally:
        _offered = before


def use_segments(model: Any) -> bool:
    """Has a model compute attention inside segments; False where its code asks no table for its attention."""
    name = NAMES.get(model.config._attn_implementation)
    if name is None or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(name)
    return True


def shown(hf_config: Any) -> str:
    """What model.attention calls the attention of a model."""
    name: str = hf_config._attn_implementation
    return "segments" if name in NAMES.values() else name


def _mask_for(base: str) -> Callable[..., Any]:
    def mask(*, mask_function: Callable[..., Any], attention_mask: Any = None, **given: Any) -> Any:
        sizes = given["batch_size"], given["q_length"], given["kv_length"]
        fits = _offered is not None and sizes == (*_offered.shape, _offered.shape[1])
        if fits and attention_mask is None and not given.get("use_vmap") and _is_known(mask_function):
            return _offered
        return _MASKS[base](mask_function=mask_function, attention_mask=attention_mask, **given)

    return mask


def _is_known(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask is made of nothing but known functions, found in what each has closed over."""
    if mask_function.__module__ != masking_utils.__name__ or mask_function.__qualname__ not in _KNOWN:
        return False
    closed_over = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = [part for content in closed_over for part in (content if isinstance(content, tuple) else (content,))]
    return all(_is_known(part) for part in parts if callable(part))


def _attention_for(base: str) -> Callable[..., Any]:
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(attention_mask, Segments):
            if more.get("position_bias") is not None or not _is_causal(module, more.get("is_causal")):
                raise NotImplementedError(f"{type(module).__name__} adds to its scores, or sees what comes after.")
            out = segment_attention(
                query, key, value, attention_mask,
                scale=scaling, window=sliding_window, softcap=softcap, sinks_H=s_aux, dropout_p=dropout,
            )  # fmt: skip
            return out, None
        given = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        more |= {name: setting for name, setting in given.items() if setting is not None}
        own = sys.modules[type(module).__module__].__dict__.get("eager_attention_forward") if base == "eager" else None
        forward = own or ALL_ATTENTION_FUNCTIONS["sdpa"]
        result: tuple[torch.Tensor, torch.Tensor | None] = forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return result

    return attention


def _is_causal(module: Any, asked: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
    """In place of transformers' own, which waits for the device to say whether positions begin again anywhere."""
    if _offered is not None and position_ids.shape == _offered.shape:
        return _offered.numbers
    return _find_packed_sequence_indices(position_ids)


_find_packed_sequence_indices = masking_utils.find_packed_sequence_indices
masking_utils.find_packed_sequence_indices = _packed_sequence_indices
for _base, _name in NAMES.items():
    AttentionInterface.register(_name, _attention_for(_base))
    AttentionMaskInterface.register(_name, _mask_for(_base))
