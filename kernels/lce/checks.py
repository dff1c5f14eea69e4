"""What linear_cross_entropy refuses, with names and numbers, before anything is computed."""

import torch

IGNORE_INDEX = -100  # the label of a row that does not count
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(
    hidden_TD: torch.Tensor,
    unembed_VD: torch.Tensor,
    labels_T: torch.Tensor,
    bias_V: torch.Tensor | None,
    weights_T: torch.Tensor | None,
    rows_N: torch.Tensor | None,
) -> None:
    """Raises ValueError when shapes, dtypes, devices or layouts do not go together."""
    for name, tensor in (("hidden_TD", hidden_TD), ("unembed_VD", unembed_VD), ("bias_V", bias_V)):
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} is a DTensor: pass {name}.full_tensor(), gathered once for all chunks.")
    if unembed_VD.ndim != 2:
        flat = " A flat shard of a sharded parameter? Gather the whole weight first." if unembed_VD.ndim == 1 else ""
        raise ValueError(f"unembed_VD must be [V, D], not {tuple(unembed_VD.shape)}.{flat}")
    if labels_T.ndim != 1:
        raise ValueError(f"labels_T must be [T], not {tuple(labels_T.shape)}: flatten it.")
    num_tokens, hidden_size = len(labels_T), unembed_VD.shape[1]
    if hidden_TD.ndim != 2 or hidden_TD.shape != (num_tokens, hidden_size):
        raise ValueError(
            f"hidden_TD must be [T, D] = [{num_tokens}, {hidden_size}] for labels_T {tuple(labels_T.shape)} and "
            f"unembed_VD {tuple(unembed_VD.shape)}, not {tuple(hidden_TD.shape)}."
        )
    if min(unembed_VD.shape) == 0:
        raise ValueError(f"unembed_VD is empty: {tuple(unembed_VD.shape)}. Is its parameter sharded and not gathered?")
    if hidden_TD.dtype not in DTYPES:
        raise ValueError(f"hidden_TD must be float32, bfloat16, float16 or float64, not {hidden_TD.dtype}.")
    for name, tensor, shape, dtypes in (
        ("unembed_VD", unembed_VD, tuple(unembed_VD.shape), (hidden_TD.dtype,)),
        ("labels_T", labels_T, (num_tokens,), (torch.int64,)),
        ("bias_V", bias_V, (len(unembed_VD),), (hidden_TD.dtype,)),
        ("weights_T", weights_T, (num_tokens,), (torch.float32, torch.float64)),
        ("rows_N", rows_N, None, (torch.int64,)),
    ):
        if tensor is None:
            continue
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}.")
        if tensor.dtype not in dtypes:
            like = ", the dtype of hidden_TD" if dtypes == (hidden_TD.dtype,) else ""
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}{like}, not {tensor.dtype}.")
        if tensor.device != hidden_TD.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_TD on {hidden_TD.device}.")
    vectors = (("labels_T", labels_T), ("bias_V", bias_V), ("weights_T", weights_T))
    for name, tensor in (("hidden_TD", hidden_TD), ("unembed_VD", unembed_VD), *vectors):
        if tensor is not None and not tensor.is_contiguous():  # kernels step by one element
            raise ValueError(f"{name} has strides {tensor.stride()}: pass it contiguous.")
    if rows_N is not None and (rows_N.ndim != 1 or len(rows_N) > num_tokens):
        raise ValueError(f"rows_N must be at most {num_tokens} row numbers, [N], not {tuple(rows_N.shape)}.")
    if weights_T is not None and weights_T.requires_grad:
        raise ValueError("weights_T requires a gradient, which linear_cross_entropy does not give: detach it.")


def check_options(logit_scale: float, logit_softcap: float | None, reduction: str) -> None:
    """Raises ValueError for a number that has no meaning."""
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', not {reduction!r}: divide a sum by what you count.")
    if logit_softcap is not None and not 0 < logit_softcap < float("inf"):
        raise ValueError(f"logit_softcap must be above 0, or None, not {logit_softcap}.")
    if not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be a finite number other than 0, not {logit_scale}.")


def check_rows(rows_N: torch.Tensor, num_tokens: int) -> None:
    """Raises ValueError for a row outside its range, or named twice. Reads the tensor: on a GPU this waits for it."""
    if len(rows_N) == 0:
        return
    low, high = int(rows_N.min()), int(rows_N.max())
    if low < 0 or high >= num_tokens:
        raise ValueError(f"rows_N holds {low if low < 0 else high}, outside 0 to {num_tokens - 1}.")
    if len(torch.unique(rows_N)) != len(rows_N):
        raise ValueError("rows_N names a row twice.")


def check_labels(labels_N: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError for a label outside the vocabulary. Reads the tensor: on a GPU this waits for it."""
    if len(labels_N) == 0:
        return
    low, high = int(labels_N.min()), int(labels_N.max())
    if low >= 0 and high < vocab_size:
        return
    wrong = low if low < 0 else high
    if wrong == IGNORE_INDEX:
        raise ValueError(f"rows_N names a row whose label is ignore_index={IGNORE_INDEX}: leave such rows out of it.")
    raise ValueError(f"labels_T holds {wrong}, outside 0 to {vocab_size - 1} and not ignore_index={IGNORE_INDEX}.")
