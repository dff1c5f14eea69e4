"""The kernels on a GPU: bfloat16 on heads and layers of real models, every option, and bitwise repetition.

Needs only torch, triton, pytest, pytest-timeout and the folder tunesmith/, so it also runs where the rest of Tunesmith
is not installed. On a lent machine (docs/gpu.md), where the folder of the link must not be the repository's root:

    mkdir -p /tmp/site && ln -sfn $PWD/tunesmith /tmp/site/tunesmith
    PYTHONPATH=/tmp/site pytest -n 4 --dist worksteal -m gpu -W default tests/kernels/test_gpu_kernels.py

The measure of bfloat16 is the error of the exact answer rounded to bfloat16: a kernel may add 0.25 of it. `chunked`
rounds its logits, which costs more than that whoever does it (2.4 to 5 times): it is held to that cost.
"""

import gc
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tunesmith.kernels.device import add_mm_fp32
from tunesmith.kernels.lce import backends
from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy
from tunesmith.kernels.lora.lora_linear import dora_linear, lora_linear, lora_linear_group
from tunesmith.kernels.timed_pick import pick
from tunesmith.kernels.timed_workloads import lora_workload, loss_workload

pytestmark = pytest.mark.gpu

HEADS = {"Llama-3.2-1B": (2048, 128256), "Qwen2.5-7B": (3584, 152064), "Llama-3.1-8B": (4096, 128256)}
TOKENS = 4096, 8192, 16384
ROOM = 1.25  # times the error of rounding the exact answer
FLOAT32_LIMIT = 2e-6  # relative norm
REFERENCE_ROWS = 1024
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"logit_softcap": 20.0},
    "scale": {"logit_scale": -0.75},
    "all": {"bias": True, "logit_softcap": 20.0, "logit_scale": 1.5},
}


@pytest.fixture(autouse=True)
def _all_memory() -> Iterator[None]:
    """Tests fill gigabytes: none leaves them to the next."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def head_inputs(T: int, D: int, V: int, kept: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Seeded. Logits of deviation 3; the label's is raised by 0 to 25, so that rows are from hopeless to certain."""
    lots = torch.Generator("cuda").manual_seed(T + D)
    unembed = torch.randn(V, D, generator=lots, device="cuda", dtype=dtype).mul_(3 * D**-0.5)
    labels = torch.randint(0, V, (T,), generator=lots, device="cuda")
    raised = 25 * torch.rand(T, 1, generator=lots, device="cuda")
    hidden = (torch.randn(T, D, generator=lots, device="cuda") + raised / 9 * unembed[labels]).to(dtype)
    rows = torch.randperm(T, generator=lots, device="cuda")[: round(kept * T)].sort().values
    masked = torch.full_like(labels, -100)
    masked[rows] = labels[rows]
    hidden[masked < 0] = torch.nan  # what is masked must not matter
    weights = 2 * torch.rand(T, generator=lots, device="cuda")
    return {"hidden": hidden, "unembed": unembed, "labels": masked, "rows": rows, "weights": weights}


@torch.no_grad()
def exact_loss(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses and gradients of the weighted sum in float64, some rows at a time."""
    hidden, labels, rows, weights = (given[name] for name in ("hidden", "labels", "rows", "weights"))
    wide = given["unembed"].double()
    losses = torch.zeros(len(hidden), dtype=torch.float64, device="cuda")
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float64, device="cuda")
    grad_unembed = torch.zeros_like(wide)
    for part in rows.split(REFERENCE_ROWS):
        h, y, w = hidden[part].double(), labels[part][:, None], weights[part].double()[:, None]
        z = h @ wide.t()
        log_sum = z.logsumexp(-1, keepdim=True)
        losses[part] = (w * (log_sum - z.gather(1, y)))[:, 0]
        gradient = z.sub_(log_sum).exp_().scatter_add_(1, y, torch.full_like(w, -1.0)).mul_(w)
        grad_hidden[part] = gradient @ wide
        grad_unembed.addmm_(gradient.t(), h)
    return {"loss": losses, "hidden": grad_hidden, "unembed": grad_unembed}


def found_loss(given: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    """The same by a back end: gradients of the sum, and each token's loss."""
    hidden, unembed = given["hidden"].requires_grad_(), given["unembed"].requires_grad_()
    arguments = {"weights_T": given["weights"], "rows_N": given["rows"], "backend": backend}
    linear_cross_entropy(hidden, unembed, given["labels"], **arguments).backward()
    found = {"hidden": hidden.grad, "unembed": unembed.grad}
    hidden.grad = unembed.grad = None
    with torch.no_grad():
        found["loss"] = linear_cross_entropy(hidden, unembed, given["labels"], reduction="none", **arguments)
    return found


@torch.no_grad()
def rounded_logits_error(given: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """What it costs to round logits and their gradient to bfloat16, as every loss does that stores the logits."""
    labels, weights, unembed = given["labels"], given["weights"], given["unembed"]
    losses, grad_hidden = torch.zeros_like(weights), torch.zeros_like(given["hidden"])
    grad_unembed = torch.zeros_like(unembed, dtype=torch.float32)
    for part in given["rows"].split(REFERENCE_ROWS):
        h, y, w = given["hidden"][part], labels[part][:, None], weights[part][:, None]
        z = (h @ unembed.t()).float()
        log_sum = z.logsumexp(-1, keepdim=True)
        losses[part] = (w * (log_sum - z.gather(1, y)))[:, 0]
        gradient = (z.sub_(log_sum).exp_().scatter_add_(1, y, torch.full_like(w, -1.0)) * w).to(h.dtype)
        grad_hidden[part] = gradient @ unembed
        add_mm_fp32(grad_unembed, gradient.t(), h, start=False)
    found = {"loss": losses, "hidden": grad_hidden, "unembed": grad_unembed.to(unembed.dtype)}
    return {name: error(found[name], exact[name]) for name in exact}


def error(found: torch.Tensor | None, exact: torch.Tensor) -> float:
    """Relative norm of the difference, in pieces: the exact one may take gigabytes."""
    assert found is not None
    assert found.shape == exact.shape
    squares = total = 0.0
    for mine, right in zip(found.split(8192), exact.split(8192), strict=True):
        squares += float((mine.double() - right).square().sum())
        total += float(right.double().square().sum())
    return (squares / total) ** 0.5


@pytest.mark.parametrize("kept", [1.0, 0.35])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_on_a_real_head_costs_no_more_than_its_rounding_and_repeats_to_the_last_bit(head, T, kept):
    given = head_inputs(T, *HEADS[head], kept, torch.bfloat16)
    exact = exact_loss(given)
    limits = {"anchored": {name: ROOM * error(value.bfloat16(), value) for name, value in exact.items()}}
    limits["chunked"] = {name: 1.05 * value for name, value in rounded_logits_error(given, exact).items()}
    for backend, limit in limits.items():
        found = found_loss(given, backend)
        errors = {name: error(found[name], exact[name]) for name in limit}
        assert {n: (e, limit[n]) for n, e in errors.items() if not e <= limit[n]} == {}, backend
        again = found_loss(given, backend)
        assert all(torch.equal(found[name], again[name]) for name in found), backend


def reference(given: dict[str, Any], bias: torch.Tensor | None, settings: dict[str, Any]) -> torch.Tensor:
    """Weighted loss of each kept token in the dtype of its inputs, as a textbook writes it."""
    rows = given["rows"]
    z = given["hidden"][rows] @ given["unembed"].t()
    z = (z if bias is None else z + bias) * settings.get("logit_scale", 1.0)
    if cap := settings.get("logit_softcap"):
        z = cap * torch.tanh(z / cap)
    return -z.log_softmax(-1).gather(1, given["labels"][rows][:, None])[:, 0] * given["weights"][rows]


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. backend chunked instead of anchored")
@pytest.mark.parametrize("backend", ["anchored", "chunked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_and_gradient_on_a_gpu(option, dtype, backend):
    """float32 against float64 without tensor cores; bfloat16 within the roundings that the back ends are made of."""
    settings = dict(OPTIONS[option])
    biased = settings.pop("bias", False)
    given = head_inputs(700, 192, 1003, 0.7, getattr(torch, dtype))
    given["hidden"][given["labels"] < 0] = 0  # the textbook multiplies before it drops
    bias = torch.linspace(-2, 2, 1003, device="cuda").to(given["hidden"].dtype) if biased else None
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    leaves = [wide["hidden"].requires_grad_(), wide["unembed"].requires_grad_()]
    exact = reference(wide, None if bias is None else bias.double(), settings).sum()
    right = torch.autograd.grad(exact, leaves)
    hidden, unembed = given["hidden"].requires_grad_(), given["unembed"].requires_grad_()
    with patch.object(backends, "GPU_SLAB_BYTES_TRAINABLE", 300 * 1003 * 4):
        loss, stats = linear_cross_entropy(
            hidden, unembed, given["labels"], bias_V=bias, weights_T=given["weights"], rows_N=given["rows"],
            return_stats=True, backend=backend, **settings,
        )  # fmt: skip
    found = torch.autograd.grad(loss, [hidden, unembed])
    limit = FLOAT32_LIMIT if dtype == "float32" else 2.0**-6  # bfloat16: logits of 10 with steps of 2^-7 relative
    errors = [error(mine, exactly) for mine, exactly in zip(found, right, strict=True)]
    errors.append(error(loss.detach()[None], exact.detach()[None]))
    assert max(errors) <= limit, errors
    assert all(bool(torch.isfinite(part.float()).all()) for part in stats)


LAYERS = {  # K in features, out features: of Llama-3.1-8B
    "qkv": (4096, [4096, 1024, 1024]),
    "gate_up": (4096, [14336, 14336]),
    "down": (14336, [4096]),
}


def group_inputs(K: int, outs: list[int], rank: int, rows: int, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    lots = torch.Generator("cuda").manual_seed(K + rank)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=lots, device="cuda") * shape[-1] ** -0.5).to(dtype)

    return {
        "x": [drawn(rows, K)],
        "weight": [drawn(out, K) for out in outs],
        "a": [drawn(rank, K) for _ in outs],
        "b": [drawn(out, rank) for out in outs],
        "dy": [drawn(rows, out) for out in outs],
    }


def group_results(given: dict[str, list[torch.Tensor]], backend: str, dropout_p: float) -> list[torch.Tensor]:
    """Outputs and the gradients of x, A and B; the mask is the same in every back end and dtype."""
    leaves = [tensor.detach().requires_grad_() for name in ("x", "a", "b") for tensor in given[name]]
    count = len(given["weight"])
    outputs = lora_linear_group(
        leaves[0], given["weight"], leaves[1 : 1 + count], leaves[1 + count :], [1.5] * count,
        dropout_p=dropout_p, seed=2**40 + 3, backend=backend,
    )  # fmt: skip
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, given["dy"])]


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("layer", LAYERS)
def test_lora_in_bfloat16_costs_no_more_than_plain_torch_with_the_same_mask_and_repeats(layer, rank, dropout_p):
    """The delta, the sum, u and du are each rounded once, here and there: a quarter more is for their chance."""
    given = group_inputs(*LAYERS[layer], rank, 4096, torch.bfloat16)
    wide = {name: [tensor.double() for tensor in group] for name, group in given.items()}
    exact = group_results(wide, "torch", dropout_p)
    found, plain = (group_results(given, backend, dropout_p) for backend in ("triton", "torch"))
    for number, (ours, theirs, right) in enumerate(zip(found, plain, exact, strict=True)):
        assert error(ours, right) <= ROOM * error(theirs, right), f"result {number}"
    assert all(map(torch.equal, found, group_results(given, "triton", dropout_p)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("outs", "rank"), [([96], 1), ([130, 34, 34], 8), ([257], 70)])
def test_lora_in_float32_equals_float64(outs, rank, dropout_p):
    given = group_inputs(200, outs, rank, 333, torch.float32)
    wide = {name: [tensor.double() for tensor in group] for name, group in given.items()}
    errors = map(error, group_results(given, "triton", dropout_p), group_results(wide, "torch", dropout_p))
    assert max(errors) <= FLOAT32_LIMIT


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_bias_a_transposed_weight_and_dora_on_a_gpu(transposed, dora):
    given = group_inputs(200, [130], 8, 333, torch.float32)
    weight = given["weight"][0].t().contiguous() if transposed else given["weight"][0]
    bias = torch.linspace(-1, 1, 130, device="cuda")
    tensors = [given["x"][0], weight, given["a"][0], given["b"][0], *([bias.abs() + 0.5] if dora else [])]
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (*tensors, bias)]
        out = (dora_linear if dora else lora_linear)(
            *leaves[:-1], 0.5, bias=leaves[-1], dropout_p=0.2, seed=5, transposed=transposed, backend=backend
        )
        results.append([out.detach(), *torch.autograd.grad(out, leaves, given["dy"][0].to(dtype))])
    assert max(map(error, *results)) <= FLOAT32_LIMIT


def test_every_candidate_of_the_tables_is_right_on_this_gpu(tmp_path):
    """What the timed pick of a run does, on a real head, a real group of layers, and each number of ranks."""
    from tunesmith.kernels.lora.block_tables import BUCKETS  # here: it imports triton

    gpu = torch.device("cuda")
    workloads = [
        loss_workload(2048, 2048, 128256, torch.bfloat16, gpu, trainable=False),
        lora_workload(4096, 4096, [4096, 1024, 1024], [16, 16, 16], torch.bfloat16, gpu, dropout_p=0.05),
        *(lora_workload(4096, 4096, [4096], [rank], torch.bfloat16, gpu) for rank in BUCKETS),
    ]
    found = pick(workloads, gpu, tmp_path / "picks.json")
    assert {name: choice.rejected for name, choice in found.items() if choice.rejected} == {}
    assert set(found[workloads[0].name].milliseconds) == {"torch", "anchored", "chunked"}
    print(*(f"{name}: {choice.milliseconds} {choice.blocks}" for name, choice in found.items()), sep="\n")
