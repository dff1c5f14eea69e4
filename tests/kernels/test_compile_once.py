"""No batch compiles a kernel anew in the middle of a run, where all ranks would wait for it.

Triton compiles again for an integer that becomes 1 or a multiple of 16, for a pointer that leaves 16 bytes, and for
each value of a constant. What it would compile is read from its own cache keys, on meta tensors.
"""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from matrices import covered

from tunesmith.kernels.compile_builds import dry_lora, dry_loss
from tunesmith.kernels.dry_launches import dry_launches

# Below a tile, about its size, one chunk, several chunks with nearly nothing left, and with much.
NUM_ROWS = (1, 2, 3, 15, 16, 17, 64, 127, 128, 1000, 1025, 4104, 8200, 12_345)


def compiled_anew(arch: int, call: Callable[..., None]) -> dict[str, int]:
    """How many more times each kernel is compiled than for one batch of 2,048 rows."""
    with dry_launches(arch) as launches:
        call(num_rows=2048)
        known = {launch.key for launch in launches}
        assert known
        launches.clear()
        for num_rows in NUM_ROWS:
            call(num_rows=num_rows)
    names = {launch.key: launch.kernel.fn.__name__ for launch in launches if launch.key not in known}
    return {name: list(names.values()).count(name) for name in names.values()}


@pytest.mark.parametrize(
    ("backend", "arch", "sizes"),
    covered(
        itertools.product(("anchored", "chunked"), (80, 90), [(256, 1000), (4096, 128_256), (1001, 50_257)]),
        [("anchored", 90, (256, 1000)), ("anchored", 80, (1001, 50_257)), ("chunked", 90, (4096, 128_256))],
    ),
)
def test_no_number_of_rows_compiles_the_loss_again(backend, arch, sizes):
    call = partial(dry_loss, backend, *sizes, torch.bfloat16, {"return_stats": True, "bias": True})
    assert compiled_anew(arch, call) == {}


@pytest.mark.parametrize(
    ("arch", "features", "rank", "dtype"),
    covered(
        itertools.product((80, 90), (512, 1001), (8, 64, 200), (torch.bfloat16, torch.float32)),
        [(90, 512, 8, torch.bfloat16), (80, 1001, 200, torch.bfloat16), (90, 1001, 64, torch.float32)],
    ),
)
def test_no_number_of_rows_compiles_a_lora_layer_again(arch, features, rank, dtype):
    assert compiled_anew(arch, partial(dry_lora, features, features, rank, dtype, dropout_p=0.1, bias=True)) == {}
