"""What timed_pick.py times: the operations of this folder at the sizes of a run, on random numbers."""

from collections.abc import Sequence

import torch

from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy
from tunesmith.kernels.lora.lora_linear import lora_linear_group
from tunesmith.kernels.timed_pick import TimedCall, Workload

SEED = 20_240


def loss_workload(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trainable: bool,
    bias: bool = False,
    softcap: float | None = None,
) -> Workload:
    """One forward and backward of linear_cross_entropy; trainable: the head gets a gradient too."""

    def prepare() -> TimedCall:
        drawn = torch.Generator(device).manual_seed(SEED)
        hidden = torch.randn(rows, hidden_size, generator=drawn, device=device).to(dtype).requires_grad_()
        unembed = torch.randn(vocab_size, hidden_size, generator=drawn, device=device, dtype=dtype)
        unembed.mul_(2 * hidden_size**-0.5).requires_grad_(trainable)
        labels = torch.randint(0, vocab_size, (rows,), generator=drawn, device=device)
        rows_N = torch.arange(rows, device=device)
        bias_V = torch.randn(vocab_size, generator=drawn, device=device).to(dtype) if bias else None
        leaves = {"hidden": hidden, "unembed": unembed} if trainable else {"hidden": hidden}

        def run(backend: str) -> dict[str, torch.Tensor]:
            loss = linear_cross_entropy(
                hidden, unembed, labels, bias_V=bias_V, rows_N=rows_N, logit_softcap=softcap, backend=backend
            )
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

        return run

    what = f"{'trained' if trainable else 'frozen'} head{', bias' if bias else ''}{', cap' if softcap else ''}"
    name = f"loss, {what}, {dtype}, T={rows} D={hidden_size} V={vocab_size}"
    return Workload(name, prepare, ("anchored", "chunked"), dtype, (vocab_size, hidden_size))


def lora_workload(
    rows: int,
    in_features: int,
    out_features: Sequence[int],
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout_p: float = 0.0,
) -> Workload:
    """One forward and backward of lora_linear_group with frozen weights."""

    def prepare() -> TimedCall:
        drawn = torch.Generator(device).manual_seed(SEED)

        def tensor(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=drawn, device=device) * shape[-1] ** -0.5).to(dtype)

        x = tensor(rows, in_features).requires_grad_()
        weights = [tensor(outs, in_features) for outs in out_features]
        lora_as = [tensor(rank, in_features).requires_grad_() for rank in ranks]
        lora_bs = [tensor(outs, rank).requires_grad_() for outs, rank in zip(out_features, ranks, strict=True)]
        dys = [tensor(rows, outs) for outs in out_features]

        def run(backend: str) -> dict[str, torch.Tensor]:
            outputs = lora_linear_group(
                x, weights, lora_as, lora_bs, [1.0] * len(ranks), dropout_p=dropout_p, seed=SEED,
                backend="torch" if backend == "torch" else "triton",
            )  # fmt: skip
            gradients = torch.autograd.grad(outputs, [x, *lora_as, *lora_bs], dys)
            results = [*(output.detach() for output in outputs), *gradients]
            return {f"result {number}": result for number, result in enumerate(results)}

        return run

    sizes = " ".join(f"{outs}x{rank}" for outs, rank in zip(out_features, ranks, strict=True))
    name = f"lora, {dtype}, N={rows} K={in_features} OxR={sizes}{' dropout' if dropout_p else ''}"
    return Workload(name, prepare, ("triton",), dtype)
