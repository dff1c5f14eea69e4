"""Ways to compute the loss of an output head, for gpu_loss.py: ours and the others', each with the same inputs.

A contestant takes hidden_TD, unembed_VD, labels_T (with -100 where ignored) and rows_N (which are not), and returns the
sum of the losses as one number with a gradient. Ours alone reads rows_N: the collator of a run knows them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.kernels.device import add_mm_fp32, why_not_triton
from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
COMPILED_CHUNKS = 8
QUACK_CHUNK = 4096  # its default
LIGER_BUDGET = 8  # times Liger's default room for logits, which its own source offers against many small chunks


def contestants(device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """Those that run here, and why the others do not."""
    makers: dict[str, Callable[[torch.device], Loss]] = {
        "anchored": lambda _: _ours("anchored", device),
        "chunked": lambda _: _ours("chunked", device),
        "ours_torch": lambda _: _ours("torch", device),
        "liger": _liger,
        "liger_x8": lambda _: _liger(device, chunk_mem_const=LIGER_BUDGET),
        "liger_cute": _liger_cute,
        "quack": _quack,
        "cce": _cce,
        "torch_chunked": _torch_chunked,
        "compiled_chunks": _compiled_chunks,
        "naive": lambda _: naive,
    }
    found, absent = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make(device)
        except (ImportError, Absent) as reason:
            absent[name] = str(reason)
    return found, absent


class Absent(Exception):
    """A contestant that cannot take part, and why."""


def _ours(backend: str, device: torch.device) -> Loss:
    if backend == "torch" and device.type == "cuda":
        raise Absent("it is for the CPU; on a GPU the Triton back ends compete")
    if backend != "torch" and (reason := why_not_triton(device)):
        raise Absent(reason)

    def loss(hidden: torch.Tensor, unembed: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        every = len(rows) == len(labels)
        return linear_cross_entropy(
            hidden, unembed, labels, rows_N=None if every and not labels.is_cuda else rows, backend=backend
        )

    return loss


def _needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("it needs CUDA")


def _liger(device: torch.device, **settings: Any) -> Loss:
    _needs_gpu(device)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    def loss(hidden: torch.Tensor, unembed: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction; then what
        # its module passes: softcap, return_z_loss, accum_dtype, token scaling, accuracy, predictions, implementation
        basic = (hidden, unembed, labels, None, None, -100, 0.0, 0.0, "sum")
        rest = (None, False, None, False, False, False, "nvidia-triton", None)  # CuTe's cross-entropy is liger_cute's
        return Function.apply(*basic, *rest, *settings.values())[0]

    return loss


def _liger_cute(device: torch.device) -> Loss:
    """Liger's products and cross-entropy in CuTe, for Hopper: bfloat16, T of 128s, V of 128s; else it raises."""
    _needs_gpu(device)
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        liger_fused_linear_cross_entropy_sm90 as cute,
    )

    return lambda hidden, unembed, labels, rows: cute(hidden, unembed, labels, -100, "sum")


def _quack(device: torch.device) -> Loss:
    """quack in the chunks of its own benchmark; on an H100 with V of 128s it chooses its fused backward itself."""
    _needs_gpu(device)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

    return lambda hidden, unembed, labels, rows: quack(
        hidden, unembed, labels, chunk_size=QUACK_CHUNK, ignore_index=-100, reduction="sum"
    )


def _cce(device: torch.device) -> Loss:
    """Without its filter, which drops small gradients: the exact setting of the release on PyPI, 25.1.1."""
    _needs_gpu(device)
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda hidden, unembed, labels, rows: cce(hidden, unembed, labels, reduction="sum", filter_eps=None)


def _torch_chunked(device: torch.device) -> Loss:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, unembed, labels, rows: F.linear_cross_entropy(
        hidden, unembed, labels, reduction="sum", ignore_index=-100, options=options
    )


def _compiled_chunks(device: torch.device) -> Loss:
    """Loss and gradients of one chunk, written out, through torch.compile: as few passes as Inductor can make of it."""
    _needs_gpu(device)
    chunk = torch.compile(_chunk, dynamic=True)
    return lambda hidden, unembed, labels, rows: _Chunks.apply(hidden, unembed, labels, chunk)


def _chunk(hidden: torch.Tensor, unembed: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ unembed.t()).float()
    kept = labels >= 0
    log_sum = logits.logsumexp(-1)
    own = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    loss = torch.where(kept, log_sum - own, 0).sum()
    one_hot = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    gradient = torch.where(kept[:, None], (logits - log_sum[:, None]).exp() - one_hot.float(), 0)
    return loss, gradient.to(hidden.dtype)


class _Chunks(torch.autograd.Function):
    """Gradients in the forward, chunk by chunk, as in Liger."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, unembed: torch.Tensor, labels: torch.Tensor, chunk: Any
    ) -> torch.Tensor:
        wants_hidden, wants_unembed = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_unembed = torch.empty_like(unembed, dtype=torch.float32) if wants_unembed else None
        total = torch.zeros((), device=hidden.device)
        rows = -(-len(hidden) // COMPILED_CHUNKS)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            loss, gradient = chunk(hidden[part], unembed, labels[part])
            total += loss
            if grad_hidden is not None:
                torch.mm(gradient, unembed, out=grad_hidden[part])
            if grad_unembed is not None:
                add_mm_fp32(grad_unembed, gradient.t(), hidden[part], start=start == 0)
        ctx.save_for_backward(grad_hidden, grad_unembed)
        ctx.dtype = unembed.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        grad_hidden, grad_unembed = ctx.saved_tensors
        scaled_unembed = None if grad_unembed is None else (grad_unembed * upstream).to(ctx.dtype)
        return None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype), scaled_unembed, None, None


def naive(hidden: torch.Tensor, unembed: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Whole logits, upcast, as transformers does without a kernel."""
    return F.cross_entropy((hidden @ unembed.t()).float(), labels, ignore_index=-100, reduction="sum")
