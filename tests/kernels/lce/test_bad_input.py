"""What linear_cross_entropy refuses, and in which words."""

from typing import Any

import pytest
import torch

from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy

T, D, V = 4, 6, 9


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "hidden_TD": torch.randn(T, D),
        "unembed_VD": torch.randn(V, D),
        "labels_T": torch.tensor([0, 3, -100, 8]),
    }
    arguments |= changes
    return linear_cross_entropy(**arguments)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hidden of other length": ({"hidden_TD": torch.randn(5, D)}, r"hidden_TD must be \[T, D\] = \[4, 6\].*not \(5, "),
    "hidden of other width": ({"hidden_TD": torch.randn(T, 7)}, r"hidden_TD must be .*not \(4, 7\)"),
    "hidden of three dimensions": ({"hidden_TD": torch.randn(1, T, D)}, r"not \(1, 4, 6\)"),
    "flat shard": ({"unembed_VD": torch.randn(V * D)}, r"unembed_VD must be \[V, D\].*flat shard.*Gather"),
    "empty shard": ({"unembed_VD": torch.randn(0, D)}, "unembed_VD is empty.*sharded and not gathered"),
    "dtypes": (
        {"unembed_VD": torch.randn(V, D).bfloat16()},
        "unembed_VD must be torch.float32, the dtype of hidden_TD, not",
    ),
    "integer hidden": ({"hidden_TD": torch.ones(T, D, dtype=torch.int64)}, "hidden_TD must be float32, bfloat16"),
    "int32 labels": ({"labels_T": torch.zeros(T, dtype=torch.int32)}, "labels_T must be torch.int64, not torch.int"),
    "label too large": ({"labels_T": torch.tensor([0, 9, 1, 1])}, "labels_T holds 9, outside 0 to 8"),
    "label below 0": ({"labels_T": torch.tensor([0, -1, 1, 1])}, "labels_T holds -1, .* and not ignore_index"),
    "bias": ({"bias_V": torch.zeros(8)}, r"bias_V must have shape \(9,\), not \(8,\)"),
    "weights": ({"weights_T": torch.zeros(T, 1)}, r"weights_T must have shape \(4,\), not \(4, 1\)"),
    "trained weights": ({"weights_T": torch.zeros(T, requires_grad=True)}, "weights_T requires a gradient"),
    "strided hidden": ({"hidden_TD": torch.randn(D, T).T}, r"hidden_TD has strides \(1, 4\): pass it contiguous"),
    "strided head": ({"unembed_VD": torch.randn(D, V).T}, "unembed_VD has strides"),
    "strided labels": ({"labels_T": torch.zeros(2 * T, dtype=torch.int64)[::2]}, r"labels_T has strides \(2,\)"),
    "strided bias": ({"bias_V": torch.zeros(2 * V)[::2]}, r"bias_V has strides \(2,\): pass it contiguous"),
    "one weight spread": ({"weights_T": torch.ones(1).expand(T)}, r"weights_T has strides \(0,\)"),
    "device": ({"bias_V": torch.zeros(V, device="meta")}, "bias_V is on meta, hidden_TD on cpu"),
    "row outside": ({"rows_N": torch.tensor([0, 4])}, "rows_N holds 4, outside 0 to 3"),
    "row before": ({"rows_N": torch.tensor([-1])}, "rows_N holds -1, outside 0 to 3"),
    "row without a label": ({"rows_N": torch.tensor([2])}, "rows_N names a row whose label is ignore_index=-100"),
    "labels of other shape": ({"labels_T": torch.tensor(3)}, r"labels_T must be \[T\], not \(\): flatten it"),
    "row twice": ({"rows_N": torch.tensor([1, 1])}, "rows_N names a row twice"),
    "too many rows": ({"rows_N": torch.arange(5)}, r"rows_N must be at most 4 row numbers, \[N\], not \(5,\)"),
    "reduction": ({"reduction": "mean"}, "reduction must be 'sum' or 'none', not 'mean': divide a sum"),
    "softcap": ({"logit_softcap": 0.0}, "logit_softcap must be above 0, or None, not 0.0"),
    "scale": ({"logit_scale": float("nan")}, "logit_scale must be a finite number other than 0, not nan"),
    "backend": ({"backend": "cuda"}, "backend must be one of auto, triton, anchored, chunked, torch, not 'cuda'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    changes, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        call(**changes)


def test_a_dtensor_is_named(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.randn(V, D), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"unembed_VD is a DTensor: pass unembed_VD.full_tensor\(\)"):
            call(unembed_VD=sharded)
    finally:
        dist.destroy_process_group()


def test_what_cannot_run_here_falls_back_and_says_so_once():
    with pytest.warns(UserWarning, match="backend torch instead of anchored: there is no GPU"):
        first = call(backend="anchored", hidden_TD=torch.ones(T, D), unembed_VD=torch.ones(V, D))
    again = call(backend="anchored", hidden_TD=torch.ones(T, D), unembed_VD=torch.ones(V, D))  # a warning is an error
    assert first == again == pytest.approx(3 * torch.log(torch.tensor(9.0)).item())


def test_no_token_at_all_is_a_loss_of_zero():
    hidden = torch.randn(0, D, requires_grad=True)
    loss = call(hidden_TD=hidden, labels_T=torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, D)
