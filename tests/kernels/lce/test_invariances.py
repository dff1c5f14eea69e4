"""What must not change the loss or its gradients: chunks, order, splits of the batch, masked rows.

And what the operation must not do: hold anything of tokens x vocabulary, or go on with input that makes no sense.
"""

import os
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tunesmith.kernels.lce import backends
from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy

LIMIT = 2e-6
BACKENDS = ("torch", "chunked", "anchored")
T, D, V = 37, 24, 203


def given(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, unembed, labels with a third masked, weights."""
    lots = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (T,), generator=lots)
    labels[torch.rand(T, generator=lots) < 0.3] = -100
    hidden, unembed = torch.randn(T, D, generator=lots) * scale, torch.randn(V, D, generator=lots)
    return hidden, unembed, labels, torch.rand(T, generator=lots)


def gradients(hidden: torch.Tensor, unembed: torch.Tensor, labels: torch.Tensor, **settings: Any) -> list[torch.Tensor]:
    """The summed loss and its gradients."""
    hidden, unembed = hidden.detach().clone().requires_grad_(), unembed.detach().clone().requires_grad_()
    loss = linear_cross_entropy(hidden, unembed, labels, **settings)
    loss.sum().backward()
    assert hidden.grad is not None
    assert unembed.grad is not None
    return [loss.detach().sum(), hidden.grad, unembed.grad]


def distance(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Largest relative norm of the differences."""
    pairs = zip(ones, others, strict=True)
    return max(float((one.double() - other).norm() / other.double().norm().clamp(min=1e-30)) for one, other in pairs)


def chunks(backend: str) -> float:
    hidden, unembed, labels, weights = given()
    whole = gradients(hidden, unembed, labels, weights_T=weights, backend=backend)
    found = []
    for size in (4, 7, 1000):  # rows of a slab; the last holds all
        with patch.object(backends, "CPU_SLAB_BYTES", 4 * V * size):
            found.append(gradients(hidden, unembed, labels, weights_T=weights, backend=backend))
    return max(distance(one, whole) for one in found)


def order(backend: str) -> float:
    hidden, unembed, labels, weights = given(1)
    shuffled = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    loss, grad, head = gradients(hidden, unembed, labels, weights_T=weights, backend=backend)
    again = gradients(
        hidden[shuffled].contiguous(), unembed, labels[shuffled], weights_T=weights[shuffled], backend=backend
    )
    return distance(again, [loss, grad[shuffled], head])


def micro_batches(backend: str) -> float:
    hidden, unembed, labels, weights = given(2)
    whole = gradients(hidden, unembed, labels, weights_T=weights, backend=backend)
    parts = [
        gradients(hidden[part], unembed, labels[part], weights_T=weights[part], backend=backend)
        for part in (slice(0, 10), slice(10, 11), slice(11, T))
    ]
    joined = [sum(p[0] for p in parts), torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)]
    return distance(joined, whole)  # type: ignore[arg-type]


def weights_before_or_after(backend: str) -> float:
    """weights_T, the same weights on the unreduced loss, and two passes of half the weight each."""
    hidden, unembed, labels, weights = given(4)
    inside = gradients(hidden, unembed, labels, weights_T=weights, backend=backend)
    h, w = hidden.clone().requires_grad_(), unembed.clone().requires_grad_()
    loss = (linear_cross_entropy(h, w, labels, reduction="none", backend=backend) * weights).sum()
    loss.backward()
    assert h.grad is not None
    assert w.grad is not None
    halves = [
        2 * x for x in gradients(hidden, unembed, labels, weights_T=weights / 2, reduction="none", backend=backend)
    ]
    return max(distance(inside, [loss.detach(), h.grad, w.grad]), distance(halves, inside))


def given_rows(backend: str) -> float:
    """Rows named by the caller, in any order, against rows found by ignore_index."""
    hidden, unembed, labels, _ = given(5)
    rows = (labels != -100).nonzero()[:, 0].flip(0)
    named = gradients(hidden, unembed, labels, rows_N=rows, backend=backend)
    return distance(named, gradients(hidden, unembed, labels, backend=backend))


def masked_rows_do_not_matter(backend: str) -> bool:
    """NaN and infinity in rows without a label change no bit."""
    hidden, unembed, labels, _ = given(6)
    clean = gradients(hidden, unembed, labels, backend=backend)
    hidden[labels == -100] = float("nan")
    hidden[(labels == -100).nonzero()[0]] = float("inf")
    return all(
        torch.equal(*pair) for pair in zip(clean, gradients(hidden, unembed, labels, backend=backend), strict=True)
    )


def scaled(backend: str) -> float:
    """Hidden states times 8 and logit_scale 1/8, a power of two: the same bits but for the gradient's factor."""
    hidden, unembed, labels, _ = given(7)
    loss, grad, head = gradients(hidden, unembed, labels, backend=backend)
    return distance(gradients(hidden * 8, unembed, labels, logit_scale=1 / 8, backend=backend), [loss, grad / 8, head])


def nan_is_seen(backend: str) -> bool:
    """A NaN in a row that counts makes the loss NaN, whatever the back end."""
    hidden, unembed, labels, _ = given(8)
    labels[0] = 1
    hidden[0, 0] = float("nan")
    return bool(gradients(hidden, unembed, labels, backend=backend)[0].isnan())


INVARIANCES = (chunks, order, micro_batches, weights_before_or_after, given_rows, scaled)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("invariance", INVARIANCES, ids=lambda function: function.__name__)
def test_the_result_does_not_depend_on(invariance, backend, interpreter):
    found = invariance(backend) if backend == "torch" else interpreter.run(invariance, backend=backend)
    assert found <= LIMIT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("claim", [masked_rows_do_not_matter, nan_is_seen], ids=lambda function: function.__name__)
def test_nan(claim, backend, interpreter):
    assert claim(backend) if backend == "torch" else interpreter.run(claim, backend=backend)


def test_nothing_of_tokens_times_vocabulary_is_saved_for_the_backward():
    hidden, unembed, labels, _ = given()
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    for trained in (False, True):
        saved.clear()
        h, w = hidden.clone().requires_grad_(), unembed.clone().requires_grad_(trained)
        one_row = patch.object(backends, "CPU_SLAB_BYTES", 4 * V)
        with one_row, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            linear_cross_entropy(h, w, labels)
        kept = int((labels != -100).sum())
        # the rows, the gradient of the rows, and of the head where it is trained
        assert sum(saved) <= kept + kept * D + (V * D if trained else 0)


MEMORY = """
import re, sys, time, torch
import torch.nn.functional as F
from tunesmith.kernels.lce import backends
from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy
def kib(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.manual_seed(0)
T, D, V = 8192, 64, 128256
hidden, unembed = torch.randn(T, D, requires_grad=True), torch.randn(V, D)
labels = torch.randint(0, V, (T,))
def ours(t=T): return linear_cross_entropy(hidden[:t], unembed, labels[:t])
def naive(t=T): return F.cross_entropy(hidden[:t] @ unembed.T, labels[:t], reduction="sum")
loss = {"ours": ours, "naive": naive}[sys.argv[1]]
loss(1).backward()
hidden.grad = None
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here: imports had a peak of their own
before = kib("VmRSS")
start = time.process_time()  # one thread: what else the machine does must not decide a test
value = loss()
value.backward()
seconds = time.process_time() - start
print(kib("VmHWM") - before, seconds, float(value.detach()))
"""


def run_memory(which: str) -> tuple[float, float, float]:
    """Extra peak memory in KiB, seconds, and the loss, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, which], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=250,
    )  # fmt: skip
    kibibytes, seconds, value = map(float, done.stdout.split())
    return kibibytes, seconds, value


@pytest.mark.slow
def test_the_peak_is_under_a_twentieth_of_the_naive_loss_and_it_is_no_slower(record_property):
    ours, naive = run_memory("ours"), run_memory("naive")
    assert ours[2] == pytest.approx(naive[2], rel=1e-6)
    record_property("peak_ratio", ours[0] / naive[0])
    record_property("time_ratio", ours[1] / naive[1])
    assert ours[0] < naive[0] / 20
    assert ours[1] < naive[1]
