"""What the packages flash-attn (FlashAttention 2) and flash-attn-3 add where they are installed.

FlashAttention 3 stands in for torch's own kernels on a Hopper GPU, through torch's registry; FlashAttention 2, which
torch has itself, is asked for soft caps only.
"""

import importlib.util
import warnings
from functools import cache

import torch

from tunesmith.kernels.attention.segments import Segments


@cache
def activate_flash_attention_3(device: torch.device) -> None:
    """Has torch call FlashAttention 3 from now on, in general, if it is there and this is a GPU for it."""
    if torch.cuda.get_device_capability(device)[0] != 9 or not importlib.util.find_spec("flash_attn_interface"):
        return
    from torch.nn import attention

    # torch 2.10 has the registry, and 2.11 the entry.
    if "FA3" in attention.list_flash_attention_impls() and not attention.current_flash_attention_impl():
        try:
            attention.activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError) as error:  # it is built for another torch or CUDA
            warnings.warn(f"FlashAttention 3 is installed and cannot be used: {error}", stacklevel=2)


def leave_flash_attention_3() -> None:
    """Has torch call its own kernels again, which know dropout."""
    from torch.nn import attention

    if attention.current_flash_attention_impl() == "FA3":
        attention.restore_flash_attention_impl()


def takes(query: torch.Tensor, value: torch.Tensor, sinks_H: torch.Tensor | None) -> bool:
    """Whether flash-attn computes attention with a soft cap of such tensors."""
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    return (
        query.is_cuda
        and is_16_bit
        and sinks_H is None
        and query.shape[-1] == value.shape[-1] <= 256
        and importlib.util.find_spec("flash_attn") is not None
    )


def attend(
    query_BHSK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSE: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    softcap: float,
    dropout_p: float,
) -> torch.Tensor:
    """[B, S, H, E]. See segment_attention(); flash-attn 2.6 or newer."""
    from flash_attn import flash_attn_varlen_func

    query, key, value = (it.transpose(1, 2).flatten(0, 1) for it in (query_BHSK, key_BGSK, value_BGSE))
    bounds, longest = segments.cu_seqlens, segments.max_length
    out: torch.Tensor = flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest,
        dropout_p=dropout_p, softmax_scale=scale, causal=True, softcap=softcap,
        window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip
    return out.unflatten(0, segments.shape)
