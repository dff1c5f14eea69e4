# mypy: disable-error-code="no-untyped-def"
"""The rotation as one Triton kernel for queries and keys: a program is one position of one sequence, all its heads."""

import torch
import triton
import triton.language as tl

from tunesmith.kernels.blocks import Table, block, choose


def head_blocks(features: int) -> Table:
    """Heads of a tile, two halves of each: 16 elements a thread of either."""
    half = triton.next_power_of_2(features // 2)
    found = [block(4, 2, BLOCK_H=max(1, 2048 // half), BLOCK_K=half)]
    return {90: found, 80: found, 0: [block(4, 1, BLOCK_H=2, BLOCK_K=half)]}


@triton.jit
def _rotate(
    x, y, heads, x_stride, y_stride, cos, sin, half_K, first, second, TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All heads of one position. cos and sin point at its rows; first and second are the places of the two halves."""
    within = first < half_K
    cos_low = tl.load(cos + first, mask=within, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + second, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + first, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + second, mask=within, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        sin_low, sin_high = -sin_high, -sin_low
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        inside = (head[:, None] < heads) & within[None, :]
        row = head[:, None].to(tl.int64)  # head * stride passes 2^31 where heads lie apart: [B, H, T, K] in memory
        source, target = x + row * x_stride, y + row * y_stride
        a = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + second[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(target + first[None, :], (a * cos_low - b * sin_low).to(y.dtype.element_ty), mask=inside)
        tl.store(target + second[None, :], (b * cos_high + a * sin_high).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "G"])
def rope_kernel(
    q, k, cos, sin, q_out, k_out, H, G, half_K,
    q_B, q_H, q_T, k_B, k_G, k_T, q_out_B, q_out_H, q_out_T, k_out_B, k_out_G, k_out_T, cos_B, cos_T,
    TRANSPOSED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q_B is the stride of q along B, and so on."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)  # int64: B * T * H * K passes 2^31
    first = tl.arange(0, BLOCK_K)
    second = first + half_K
    cos += b * cos_B + t * cos_T
    sin += b * cos_B + t * cos_T
    q += b * q_B + t * q_T
    k += b * k_B + t * k_T
    q_out += b * q_out_B + t * q_out_T
    k_out += b * k_out_B + t * k_out_T
    _rotate(q, q_out, H, q_H, q_out_H, cos, sin, half_K, first, second, TRANSPOSED, BLOCK_H, BLOCK_K)
    _rotate(k, k_out, G, k_G, k_out_G, cos, sin, half_K, first, second, TRANSPOSED, BLOCK_H, BLOCK_K)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rotated; transposed: by the transposed matrix, which is what gradients take."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, positions, features = q.shape
    q_out, k_out = (x.new_empty(batch, positions, x.shape[1], features).transpose(1, 2) for x in (q, k))
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3]]
    cos_B = cos.stride(0) if len(cos) == batch else 0
    rope_kernel[positions, batch](
        q, k, cos, sin, q_out, k_out, heads, k.shape[1], features // 2, *strides, cos_B, cos.stride(1),
        TRANSPOSED=transposed, **choose("rope", head_blocks(features), q.device, (features,)).launch,
    )  # fmt: skip
    return q_out, k_out
