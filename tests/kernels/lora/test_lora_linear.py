"""lora_linear, its grouped form and dora_linear against their formulas in float64: every option, gradient and back end.

The Triton back end runs in the interpreter's process (conftest.py), where tiles are 16 x 32 and a program holds at most
32 ranks. Dropout's mask comes from kernels/philox.py, which has its own tests.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tunesmith.kernels.lora.lora_linear import dora_linear, dora_norm, lora_linear, lora_linear_group
from tunesmith.kernels.philox import dropout

LIMIT = 2e-6  # relative norm, float32
SEED = 2**63 + 11
BACKENDS = ("torch", "triton")

CASES: dict[str, dict[str, Any]] = {
    "one of everything": {"lead": [1], "K": 1, "outs": [1], "ranks": [1]},
    "odd": {"lead": [3], "K": 7, "outs": [5], "ranks": [3], "bias": True},
    "primes over a tile": {"lead": [37], "K": 53, "outs": [41], "ranks": [17], "p": 0.3, "bias": True},
    "whole tiles": {"lead": [32], "K": 64, "outs": [64], "ranks": [16]},
    "leading dims": {"lead": [2, 3, 5], "K": 33, "outs": [31], "ranks": [8], "p": 0.05},
    "a vector": {"lead": [], "K": 9, "outs": [4], "ranks": [2], "p": 0.5},
    "q, k, v": {"lead": [2, 19], "K": 48, "outs": [48, 16, 16], "ranks": [8, 8, 8], "p": 0.1, "bias": True},
    "uneven group": {"lead": [70], "K": 40, "outs": [33, 7], "ranks": [5, 20], "p": 0.25},
    "ranks in slices": {"lead": [20], "K": 33, "outs": [35], "ranks": [70], "p": 0.2},
    "a group in slices": {"lead": [18], "K": 34, "outs": [9, 10, 11], "ranks": [33, 16, 1], "p": 0.2},
    "stored transposed": {"lead": [21], "K": 35, "outs": [34], "ranks": [4], "transposed": True, "bias": True},
    "many rows": {"lead": [300], "K": 17, "outs": [19], "ranks": [2], "p": 0.4},
    "no rows": {"lead": [0], "K": 6, "outs": [5], "ranks": [2], "p": 0.5},
}


def tensors(case: dict[str, Any], dtype: torch.dtype, scale: float = 1.0) -> dict[str, list[torch.Tensor]]:
    """Seeded, rounded to dtype; x first."""
    lots = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=lots, dtype=torch.float64) * scale).to(dtype)

    features, outs, ranks = case["K"], case["outs"], case["ranks"]
    shapes = [(features, out) if case.get("transposed") else (out, features) for out in outs]
    return {
        "x": [drawn(*case["lead"], features)],
        "weight": [drawn(*shape) for shape in shapes],
        "lora_a": [drawn(rank, features) for rank in ranks],
        "lora_b": [drawn(out, rank) for out, rank in zip(outs, ranks, strict=True)],
        "bias": [drawn(out) for out in outs] if case.get("bias") else [],
        "magnitude": [drawn(out).abs() + 0.5 for out in outs],
        "dy": [drawn(*case["lead"], out) for out in outs],
    }


def dropped(x: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    """drop(x) with the factor 1 / (1 - p), as a textbook writes it."""
    drop = dropout(case.get("p", 0.0), SEED)
    if drop is None:
        return x
    rows = x.reshape(-1, x.shape[-1])
    kept = drop.keep(*rows.shape, x.device).view(x.shape)
    return x * kept / (1 - drop.threshold / 65536)


def expected(case: dict[str, Any], given: dict[str, list[torch.Tensor]], dora: bool) -> list[torch.Tensor]:
    x, *_ = given["x"]
    xd = dropped(x, case)
    outputs = []
    for i in range(len(case["outs"])):
        weight = given["weight"][i].T if case.get("transposed") else given["weight"][i]
        scaling = 0.5 + i
        update = scaling * (xd @ given["lora_a"][i].T @ given["lora_b"][i].T)
        y = x @ weight.T + update
        if dora:
            whole = weight + scaling * given["lora_b"][i] @ given["lora_a"][i]
            gain = given["magnitude"][i] / torch.linalg.norm(whole, dim=1).detach()
            y = (x - xd) @ weight.T + gain * (xd @ weight.T + update)
        outputs.append(y + given["bias"][i] if given["bias"] else y)
    return outputs


def computed(case: dict[str, Any], given: dict[str, list[torch.Tensor]], dora: bool, backend: str) -> list[Any]:
    arguments: dict[str, Any] = {"dropout_p": case.get("p", 0.0), "seed": SEED, "backend": backend}
    arguments["transposed"] = case.get("transposed", False)
    scalings = [0.5 + i for i in range(len(case["outs"]))]
    x, *_ = given["x"]
    if dora or len(case["outs"]) == 1:
        function = dora_linear if dora else lora_linear
        names = ("weight", "lora_a", "lora_b", "magnitude") if dora else ("weight", "lora_a", "lora_b")
        bias = given["bias"][0] if given["bias"] else None
        return [function(x, *(given[name][0] for name in names), scalings[0], bias=bias, **arguments)]
    groups = (given[name] for name in ("weight", "lora_a", "lora_b"))
    return list(lora_linear_group(x, *groups, scalings, biases=given["bias"] or None, **arguments))


def differentiated(
    compute: Callable[[dict[str, list[torch.Tensor]]], list[torch.Tensor]],
    given: dict[str, list[torch.Tensor]],
    wanted: list[str],
) -> dict[str, torch.Tensor]:
    """Outputs and the gradients of what is wanted."""
    given = {name: [tensor.detach().clone() for tensor in group] for name, group in given.items()}
    leaves = {f"{name}[{i}]": tensor for name in wanted for i, tensor in enumerate(given[name])}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = compute(given)
    torch.autograd.backward(outputs, given["dy"])
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    assert None not in gradients.values()
    return {f"y[{i}]": y.detach() for i, y in enumerate(outputs)} | gradients  # type: ignore[return-value]


ALL = ["x", "weight", "lora_a", "lora_b", "bias"]


def errors(
    backend: str,
    case: dict[str, Any],
    dtype: str = "float32",
    wanted: list[str] = ALL,
    dora: bool = False,
    scale: float = 1,
) -> dict[str, float]:
    """Relative norms of the error of each output and gradient; of a norm that is 0, the error itself."""
    given = tensors(case, getattr(torch, dtype), scale)
    found = differentiated(lambda given: computed(case, given, dora, backend), given, wanted)
    exact = {name: [tensor.double() for tensor in group] for name, group in given.items()}
    right = differentiated(lambda given: expected(case, given, dora), exact, wanted)
    assert found.keys() == right.keys()
    result = {}
    for name, value in right.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == getattr(torch, dtype)
        result[name] = ((found[name].double() - value).norm() / (value.norm() or 1.0)).item()
    return result


def measured(interpreter: Any, function: Callable[..., Any], backend: str, **arguments: Any) -> Any:
    """The result of a function of this file, in the process where its back end runs."""
    if backend == "triton":
        return interpreter.run(function, backend=backend, **arguments)
    return function(backend=backend, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_every_gradient_are_right(
    name: str, backend: str, interpreter: Any, record_property: Callable[[str, object], None]
) -> None:
    found = measured(interpreter, errors, backend, case=CASES[name])
    record_property("max_rel_err", max(found.values()))
    assert max(found.values()) <= LIMIT, found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted", [["lora_a"], ["lora_b"], ["x"], ["weight"], ["bias"], ["lora_a", "lora_b"], ["x", "lora_b"]], ids="+".join
)
def test_what_needs_no_gradient_can_be_left_out(wanted: list[str], backend: str, interpreter: Any) -> None:
    case = CASES["q, k, v"]
    found = measured(interpreter, errors, backend, case=case, wanted=wanted)
    assert len(found) == 3 + sum(1 if name == "x" else 3 for name in wanted)
    assert max(found.values()) <= LIMIT, found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_cost_their_own_rounding_and_no_more(dtype: str, backend: str, interpreter: Any) -> None:
    """Outputs and u are rounded, gradients of x once for each member; the interpreter cuts bfloat16 off instead."""
    found = measured(interpreter, errors, backend, case=CASES["q, k, v"], dtype=dtype, wanted=["x", "lora_a", "lora_b"])
    unit = {"bfloat16": 2.0**-7 if backend == "triton" else 2.0**-8, "float16": 2.0**-11}[dtype]  # of one rounding
    assert max(found.values()) <= 1.5 * unit, found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_dora_is_right_with_its_magnitude(p: float, transposed: bool, backend: str, interpreter: Any) -> None:
    case = {"lead": [2, 11], "K": 37, "outs": [35], "ranks": [5], "p": p, "bias": True, "transposed": transposed}
    found = measured(interpreter, errors, backend, case=case, dora=True, wanted=[*ALL, "magnitude"])
    assert max(found.values()) <= LIMIT, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doras_norm_needs_no_whole_matrix(dtype: torch.dtype) -> None:
    given = tensors(CASES["primes over a tile"], dtype)
    weight, a, b = (given[name][0] for name in ("weight", "lora_a", "lora_b"))
    exact = torch.linalg.norm(weight.double() + 0.7 * b.double() @ a.double(), dim=1)
    found = dora_norm(weight, a, b, 0.7)
    assert found.dtype == torch.float32
    assert ((found - exact).norm() / exact.norm()).item() <= LIMIT


def test_the_gradient_is_the_one_of_finite_differences() -> None:
    case = {"lead": [3], "K": 5, "outs": [4, 2], "ranks": [2, 3], "p": 0.25, "bias": True}
    given = tensors(case, torch.float64)
    inputs = [tensor.requires_grad_() for name in ALL for tensor in given[name]]

    def outputs(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(computed(case, given, False, "torch"))

    assert torch.autograd.gradcheck(outputs, inputs)


def test_a_group_gives_what_its_members_give_alone_with_the_same_seed() -> None:
    case = CASES["q, k, v"]
    given = tensors(case, torch.float64)
    together = computed(case, given, False, "torch")
    for i, y in enumerate(together):
        alone = lora_linear(
            *(given[name][0 if name == "x" else i] for name in ("x", "weight", "lora_a", "lora_b")),
            0.5 + i,
            bias=given["bias"][i],
            dropout_p=0.1,
            seed=SEED,
        )
        assert torch.allclose(alone, y, rtol=0, atol=1e-12)


def unused(backend: str) -> dict[str, float]:
    """Of a group of three of which the second's output is not used: errors, and 0 where a gradient is None."""
    case = CASES["q, k, v"]
    given = tensors(case, torch.float32)
    for name in ALL:
        for tensor in given[name]:
            tensor.requires_grad_()
    y0, _, y2 = computed(case, given, False, backend)
    torch.autograd.backward([y0, y2], [given["dy"][0], given["dy"][2]])
    exact = {name: [tensor.detach().double().requires_grad_() for tensor in group] for name, group in given.items()}
    right0, _, right2 = expected(case, exact, False)
    torch.autograd.backward([right0, right2], [exact["dy"][0], exact["dy"][2]])
    found = {}
    for name in ALL:
        for i, (tensor, right) in enumerate(zip(given[name], exact[name], strict=True)):
            if name != "x" and i == 1:
                found[f"{name}[1]"] = 0.0 if tensor.grad is None else 1.0
            else:
                assert tensor.grad is not None
                assert right.grad is not None
                found[f"{name}[{i}]"] = ((tensor.grad.double() - right.grad).norm() / right.grad.norm()).item()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_member_nobody_uses_has_no_gradient_and_disturbs_none(backend: str, interpreter: Any) -> None:
    found = measured(interpreter, unused, backend)
    assert max(found.values()) <= LIMIT, found


def repeated(backend: str) -> bool:
    """Two runs, the same to the last bit."""
    case = CASES["uneven group"]
    given = tensors(case, torch.float32)
    runs = [differentiated(lambda given: computed(case, given, False, backend), given, ALL) for _ in range(2)]
    return all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_run_is_bitwise_the_first(backend: str, interpreter: Any) -> None:
    assert measured(interpreter, repeated, backend)


def kept_bytes(backend: str, case: dict[str, Any], frozen: bool) -> dict[str, int]:
    """Bytes that the graph keeps between forward and backward, besides the layer's own matrices; of x, and of u."""
    given = tensors(case, torch.bfloat16)
    for name in ("x", "lora_a", "lora_b") if frozen else ALL:
        for tensor in given[name]:
            tensor.requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for name in ALL if name != "x" for tensor in given[name]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = computed(case, given, False, backend)
    rows, step = given["x"][0].numel() // case["K"], 16 if backend == "triton" else 1
    ranks = sum(-(-rank // step) * step for rank in case["ranks"])
    del outputs
    return {"kept": sum(kept.values()), "x": 2 * rows * case["K"], "u": 2 * rows * ranks}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q, k, v", "primes over a tile", "ranks in slices"])
@pytest.mark.parametrize("frozen", [True, False])
def test_x_and_u_are_kept_for_the_backward_pass_and_nothing_else(
    name: str, frozen: bool, backend: str, interpreter: Any
) -> None:
    found = measured(interpreter, kept_bytes, backend, case=CASES[name], frozen=frozen)
    assert found["kept"] == found["x"] + found["u"]


def recomputed(backend: str) -> bool:
    """Whether a checkpointed layer has the gradients of one that is not, to the last bit, with seeds drawn inside."""
    case = CASES["primes over a tile"]

    def layer(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seed = int(torch.randint(2**63 - 1, ()))
        return lora_linear(x, weight, a, b, 2.0, dropout_p=0.3, seed=seed, backend=backend)  # type: ignore[arg-type]

    found = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        given = tensors(case, torch.float32)
        inputs = [given[name][0].requires_grad_() for name in ("x", "weight", "lora_a", "lora_b")]
        y = checkpoint(layer, *inputs, use_reentrant=False) if checkpointed else layer(*inputs)
        torch.rand(3)  # the generator moves on before the recomputation
        y.backward(given["dy"][0])
        found.append([tensor.grad for tensor in inputs])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recomputation_drops_the_same_elements(backend: str, interpreter: Any) -> None:
    assert measured(interpreter, recomputed, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaled_inputs_are_as_right(scale: float, backend: str, interpreter: Any) -> None:
    found = measured(interpreter, errors, backend, case=CASES["odd"], scale=scale)
    assert max(found.values()) <= LIMIT, found


def test_a_gradient_that_is_not_contiguous_is_right() -> None:
    given = tensors(CASES["odd"], torch.float64)
    inputs = [given[name][0].requires_grad_() for name in ("x", "weight", "lora_a", "lora_b")]
    found = torch.autograd.grad(lora_linear(*inputs, 0.5).sum(), inputs)  # expanded from one number
    right = torch.autograd.grad(expected(CASES["odd"] | {"bias": False}, given | {"bias": []}, False)[0].sum(), inputs)
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(found, right, strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_a_second_derivative_is_refused(dora: bool) -> None:
    case = CASES["odd"] | {"p": 0.2}
    given = tensors(case, torch.float32)
    x = given["x"][0].requires_grad_()
    (y,) = computed(case, given, dora, "torch")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def asked(**changed: Any) -> torch.Tensor:
    """lora_linear with x [3, 7], weight [5, 7], r = 2, and some arguments changed."""
    arguments = {"x": torch.zeros(3, 7), "weight": torch.zeros(5, 7), "lora_a": torch.zeros(2, 7)}
    return lora_linear(**(arguments | {"lora_b": torch.zeros(5, 2), "scaling": 1.0} | changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(3, 6)}, r"x has 6 features and weight, \[O, K\], takes 7"),
        ({"x": torch.zeros(7, 3).t()}, r"x must be contiguous.*\[3, 7\] with strides \[1, 3\]"),
        ({"x": torch.zeros(3, 7, dtype=torch.int64)}, r"x must be.*torch.int64"),
        ({"weight": torch.zeros(0)}, r"weight has shape \[0\], not \[O, K\].*gathered first"),
        ({"weight": torch.zeros(7, 5)}, r"x has 7 features and weight, \[O, K\], takes 5"),
        ({"transposed": True}, r"x has 7 features and weight, \[K, O\], takes 5"),
        ({"lora_a": torch.zeros(2, 8)}, r"lora_a has shape \[2, 8\], not \[r, K\]: weight has K=7"),
        ({"lora_a": torch.zeros(7, 2).t()}, "lora_a must be contiguous"),
        ({"lora_a": torch.zeros(0, 7), "lora_b": torch.zeros(5, 0)}, r"lora_a has shape \[0, 7\]"),
        ({"lora_b": torch.zeros(5, 3)}, r"lora_b has shape \[5, 3\], not \[O, r\].*O=5 and lora_a has r=2"),
        ({"lora_b": torch.zeros(2, 5).t()}, "lora_b must be contiguous"),
        ({"lora_b": torch.zeros(5, 2).bfloat16()}, "lora_b is torch.bfloat16 on cpu, and x is torch.float32 on cpu"),
        (
            {"weight": torch.zeros(5, 7, device="meta")},
            "weight is torch.float32 on meta, and x is torch.float32 on cpu",
        ),
        ({"bias": torch.zeros(4)}, r"bias has shape \[4\], not \[5\]"),
        ({"bias": torch.zeros(5).double()}, "bias is torch.float64"),
        ({"dropout_p": 1.0, "seed": 0}, "dropout_p=1.0 is not in"),
        ({"dropout_p": 0.1}, "dropout_p=0.1 needs a seed"),
        ({"backend": "cuda"}, "backend='cuda' is not auto, triton or torch"),
        ({"backend": "triton"}, "backend=triton cannot run here: there is no GPU"),
    ],
)
def test_bad_input_is_refused_with_names_and_numbers(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asked(**changed)


def test_a_group_says_which_member_does_not_fit() -> None:
    x, weight, a, b = torch.zeros(3, 7), torch.zeros(5, 7), torch.zeros(2, 7), torch.zeros(5, 2)
    with pytest.raises(ValueError, match="have 2, 1, 2, 2, 2 entries"):
        lora_linear_group(x, [weight, weight], [a], [b, b], [1.0, 1.0])
    with pytest.raises(ValueError, match="have 0, 0, 0, 0, 0 entries"):
        lora_linear_group(x, [], [], [], [])
    with pytest.raises(ValueError, match=r"lora_b\[1\] has shape \[4, 2\]"):
        lora_linear_group(x, [weight, weight], [a, a], [b, b[:4]], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"magnitude has shape \[4\], not \[5\]"):
        dora_linear(x, weight, a, b, torch.ones(4), 1.0)
