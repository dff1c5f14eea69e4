"""Every way in which the Triton kernels are compiled, for the cross-compiler (compile_report.py).

Nothing is listed by hand but calls of the operations: with sizes that are and are not multiples of 16, with each option
and each thing to differentiate. What they launch is noted (dry_launches.py), with every candidate of the block tables.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from tunesmith.kernels import blocks, leaf_calls
from tunesmith.kernels.blocks import Block, Key
from tunesmith.kernels.dry_launches import ARCHS, Launch, dry_launches
from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy
from tunesmith.kernels.lora.lora_linear import dora_linear, lora_linear_group

Call = Callable[[], object]
ROWS = 2048


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16, trained: bool = True, late: bool = False) -> torch.Tensor:
    """late: it begins one element after a multiple of 16 bytes, as a view into a flat buffer of parameters may."""
    flat = torch.empty(math.prod(shape) + late, dtype=dtype, device="meta")[late:]
    return flat.view(shape).requires_grad_(trained and dtype.is_floating_point)


def dry_loss(
    backend: str, hidden_size: int, vocabulary: int, dtype: torch.dtype, options: dict[str, Any], num_rows: int = ROWS
) -> None:
    """A loss of a frozen head, and its gradient unless the options say forward."""
    hidden = _empty(num_rows, hidden_size, dtype=dtype, trained="forward" not in options)
    rows = _empty(num_rows, dtype=torch.int64)
    more = {name: value for name, value in options.items() if name not in ("bias", "forward", "late")}
    loss = linear_cross_entropy(
        hidden,
        _empty(vocabulary, hidden_size, dtype=dtype, trained=False, late="late" in options),
        rows,
        rows_N=rows,
        bias_V=_empty(vocabulary, dtype=dtype, trained=False) if "bias" in options else None,
        backend=backend,
        **more,
    )
    if hidden.requires_grad:
        (loss[0] if "return_stats" in options else loss).backward()


EVERYTHING = {"bias": True, "logit_softcap": 30.0, "return_stats": True}
MAIN_OPTIONS: list[dict[str, Any]] = [{}, {"forward": True, "return_stats": True}, EVERYTHING]
OPTIONS: list[dict[str, Any]] = [
    *MAIN_OPTIONS,
    {"bias": True},
    {"logit_softcap": 30.0},
    {"return_stats": True},
    {"forward": True},
    {"late": True},
    {"late": True, **EVERYTHING},
]
EVEN = 4096, 128_256
ODD_VOCABULARY = 4096, 50_257
ODD_HIDDEN = (2056, 128_256), (2056, 50_257), (1001, 128_256), (1001, 50_257)  # 2056: 8 x 257, rows on 16 bytes


def _loss_calls(backend: str, dtypes: tuple[torch.dtype, ...], uneven: Sequence[tuple[int, int]]) -> list[Call]:
    sizes = [*itertools.product([EVEN], OPTIONS), *itertools.product(uneven, MAIN_OPTIONS)]
    return [partial(dry_loss, backend, D, V, dtype, options) for dtype in dtypes for (D, V), options in sizes]


def dry_lora(
    in_features: int,
    outs: int,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
    dropout_p: float = 0.0,
    bias: bool = False,
    trained: str = "xab",
    late: bool = False,
    num_rows: int = ROWS,
) -> None:
    """A LoRA layer and the gradients of what is trained: its input, A, B."""
    x = _empty(num_rows, in_features, dtype=dtype, trained="x" in trained)
    a = _empty(rank, in_features, dtype=dtype, trained="a" in trained, late=late)
    b = _empty(outs, rank, dtype=dtype, trained="b" in trained, late=late)
    weight = _empty(outs, in_features, dtype=dtype, trained=False)
    biases = [_empty(outs, dtype=dtype, trained=False) if bias else None]
    (y,) = lora_linear_group(x, [weight], [a], [b], [1.0], biases=biases, dropout_p=dropout_p, seed=1)
    y.backward(torch.empty_like(y))


def _dora() -> None:
    x, weight, a, b = _empty(ROWS, 4096), _empty(1024, 4096, trained=False), _empty(16, 4096), _empty(1024, 16)
    y = dora_linear(x, weight, a, b, _empty(1024), 1.0, dropout_p=0.1, seed=1)
    y.backward(torch.empty_like(y))


RANKS = 1, 8, 16, 24, 32, 40, 64, 100, 128, 200  # within each bucket one that is a multiple of 16 and one that is not
PLAIN: dict[str, Any] = {}
RICH: dict[str, Any] = {"dropout_p": 0.1, "bias": True}


def _lora_calls() -> list[Call]:
    sizes = [(K, outs, rank) for rank in RANKS for K, outs in ((4096, 4096), (1001, 1001))]
    found: list[Call] = [partial(dry_lora, *size, **options) for size in sizes for options in (PLAIN, RICH)]
    for rank, trained in itertools.product(RANKS, ("ab", "xb", "xa")):
        found.append(partial(dry_lora, 4096, 4096, rank, trained=trained, **RICH))
    found += [partial(dry_lora, 4096, 4096, rank, late=True, **RICH) for rank in RANKS]
    for rank, features in itertools.product((8, 16, 32, 64), (4096, 1001)):
        found += [partial(dry_lora, features, features, rank, torch.float32, **options) for options in (PLAIN, RICH)]
    return [*found, _dora]


CALLS: dict[str, Callable[[], list[Call]]] = {  # by what makes the launches
    "anchored": partial(_loss_calls, "anchored", (torch.bfloat16,), (ODD_VOCABULARY, *ODD_HIDDEN)),
    "chunked": partial(_loss_calls, "chunked", (torch.bfloat16, torch.float16, torch.float32), (ODD_VOCABULARY,)),
    "lora": _lora_calls,
    **leaf_calls.CALLS,
}


@cache
def builds(of: str, arch: int) -> list[Launch]:
    """What the calls of an operation compile on an architecture, each once."""
    found: dict[str, Launch] = {}
    with dry_launches(arch) as launches:
        for call in CALLS[of]():
            for _ in _with_every_block(call):
                found |= {launch.key: launch for launch in launches}
                launches.clear()
    return list(found.values())


def all_builds() -> list[Launch]:
    """Everything on every architecture."""
    return [build for of in CALLS for arch in ARCHS for build in builds(of, arch)]


def _with_every_block(call: Call) -> Iterator[None]:
    """Calls with the default blocks, then with the second candidate of each table that was asked, and so on."""
    asked: dict[Key, list[Block]] = {}
    number = 0
    while number == 0 or any(number < len(candidates) for candidates in asked.values()):
        with blocks.trying({key: c[number] for key, c in asked.items() if number < len(c)}, asked):
            call()
        number += 1
        yield
