"""A linear layer with a LoRA adapter beside its weight (arXiv:2106.09685), and several that read the same input.

    y[N, O] = x W^T + scaling * drop(x) A^T B^T + bias

The base product stays with cuBLAS and is added onto the adapter's part, which is written first: so only the small part
is rounded twice. Kept for the backward pass: x, u = drop(x) A^T and the seed of the mask; no mask and no dropped x.
Layers that share x read it once for all their down-projections, forward and backward.

Back ends: Triton kernels (triton_kernels.py) on a GPU, plain torch (torch_backend.py) elsewhere, with identical masks.
DoRA (arXiv:2402.09353) is `dora_linear`; rsLoRA (arXiv:2312.03732) is only another scaling.
N rows of any leading dims, K in features, O out features, r ranks.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F

from tunesmith.kernels.device import mm_fp32, why_not_triton, without_autocast
from tunesmith.kernels.lora import torch_backend
from tunesmith.kernels.lora.autograd import Drop, LoraCall, LoraLinear
from tunesmith.kernels.lora.checks import check, check_like
from tunesmith.kernels.philox import dropout

Backend = Literal["auto", "triton", "torch"]
Tensors = Sequence[torch.Tensor]


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    transposed: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """x W^T + scaling * drop(x) A^T B^T + bias; differentiable once in every tensor.

    Args:
        x: [..., K], contiguous, bfloat16, float16 or float32 (and float64 in plain torch).
        weight: [O, K], any strides; [K, O] with `transposed`, as GPT-2's Conv1D stores it. Frozen or not.
        lora_a: [r, K], contiguous. lora_b: [O, r], contiguous. All tensors have the dtype and device of x.
        scaling: alpha / r for LoRA, alpha / sqrt(r) for rsLoRA.
        dropout_p: probability of dropping an element of x on the adapter's side, in steps of 1/65536 (philox.py).
        seed: what the mask is drawn from; needed with dropout, and the same whenever the forward is recomputed.
    Returns: [..., O], dtype of x.
    Raises: ValueError when shapes, dtypes, devices or options do not fit.
    """
    return lora_linear_group(
        x,
        [weight],
        [lora_a],
        [lora_b],
        [scaling],
        biases=[bias],
        dropout_p=dropout_p,
        seed=seed,
        transposed=transposed,
        backend=backend,
    )[0]


def lora_linear_group(
    x: torch.Tensor,
    weights: Tensors,
    lora_as: Tensors,
    lora_bs: Tensors,
    scalings: Sequence[float],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    transposed: bool = False,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, ...]:
    """lora_linear for several layers with one input, such as q, k and v. Out features and ranks may differ.

    One dropout mask is shared by the whole group, because x is read once; PEFT draws one for each layer.
    """
    biases = [None] * len(weights) if biases is None else biases
    check(x, weights, lora_as, lora_bs, scalings, biases, transposed)
    drop = dropout(dropout_p, seed)
    scale = drop.keep_scale if drop else 1.0
    call = LoraCall(_back_end(backend, x), tuple(scale * s for s in scalings), transposed, drop)
    with without_autocast(x.device):
        return LoraLinear.apply(call, x, *weights, *lora_as, *lora_bs, *biases)


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    transposed: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """DoRA as PEFT computes it: with g = magnitude / norm of the rows of W + scaling * B A, the norm a constant,

        y = (x - drop(x)) W^T + bias + g * (drop(x) W^T + scaling * drop(x) A^T B^T)

    magnitude: [O]. The other arguments are lora_linear's. With dropout, the dropped x is kept for the backward pass.
    """
    check(x, [weight], [lora_a], [lora_b], [scaling], [bias], transposed)
    check_like(x, "magnitude", magnitude)
    if magnitude.shape != lora_b.shape[:1]:
        raise ValueError(f"magnitude has shape {list(magnitude.shape)}, not [{lora_b.shape[0]}], the out features.")
    drop = dropout(dropout_p, seed)
    weight_OK = weight.t() if transposed else weight
    with without_autocast(x.device):
        # In float32 at least: near 1, 16 bits are coarse.
        gain_O = magnitude / dora_norm(weight_OK, lora_a, lora_b, scaling)
        dropped = Drop.apply(_back_end(backend, x), drop, x) if drop else x
        directed = lora_linear(dropped, weight, lora_a, lora_b, scaling, transposed=transposed, backend=backend)
        y = directed * gain_O
        if drop:
            rest = x - dropped
            # Not weight.t(): a view kept for the backward pass would hold a weight that ZeRO 3 has gathered and let go.
            y = y + (rest @ weight if transposed else F.linear(rest, weight))
        if bias is not None:
            y = y + bias
        return y.to(x.dtype)


@torch.no_grad()
def dora_norm(weight_OK: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Norm of each row of W + scaling * B A, [O], float32 (float64 for float64), without holding that matrix.

    |w + s b A|^2 = |w|^2 + b . (2 s A w + s^2 A A^T b)
    """
    wide = torch.promote_types(weight_OK.dtype, torch.float32)
    squares_O = torch.linalg.vector_norm(weight_OK, dim=1, dtype=wide).square()
    b_OR = lora_b.to(wide)
    cross_OR = 2 * scaling * mm_fp32(weight_OK, lora_a.t()) + scaling**2 * (b_OR @ mm_fp32(lora_a, lora_a.t()))
    return (squares_O + (b_OR * cross_OR).sum(1)).clamp_min(0).sqrt()


def _back_end(backend: Backend, x: torch.Tensor) -> ModuleType:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r} is not auto, triton or torch.")
    why_not = why_not_triton(x.device)
    if x.dtype is torch.float64:
        why_not = "the kernels add up in float32, and x is float64"
    if backend == "triton" and why_not:
        raise ValueError(f"backend=triton cannot run here: {why_not}.")
    if backend == "torch" or why_not or not x.numel():
        return torch_backend
    from tunesmith.kernels.lora import triton_backend  # here: importing triton is for machines that run it

    return triton_backend
