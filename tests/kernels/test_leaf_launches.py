"""How often the kernels of norms, rotations and gated units are launched and compiled, seen on meta tensors."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tunesmith.kernels.dry_launches import dry_launches
from tunesmith.kernels.leaf_calls import dry_glu, dry_norm, dry_rope

BF16 = torch.bfloat16
NUM_ROWS = (1, 2, 3, 15, 16, 17, 64, 127, 128, 1000, 1025, 4104, 8192, 12_345, 70_001)
CALLS: dict[str, Callable[..., None]] = {
    "trained norm": partial(dry_norm, 4096, BF16, trained=True),
    "frozen norm": partial(dry_norm, 128, BF16, trained=False, plain=True),
    "norm of an odd width": partial(dry_norm, 1001, BF16, trained=True),
    "rotation": partial(dry_rope, 128, BF16),
    "rotation of another number of heads": partial(dry_rope, 128, BF16, heads=28),
    "rotation in batches": partial(dry_rope, 64, BF16, batch=3),
    "activation": partial(dry_glu, 14_336, BF16, "silu"),
    "packed activation": partial(dry_glu, 8192, BF16, "gelu_tanh", packed=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("arch", [80, 90])
def test_a_pass_is_one_launch_and_no_number_of_rows_compiles_it_again(call, arch):
    with dry_launches(arch) as launches:
        for num_rows in NUM_ROWS:
            before = len(launches)
            CALLS[call](num_rows=num_rows)
            assert len(launches) == before + 2  # forward and backward
    compiled = {launch.key: launch.kernel.fn.__name__ for launch in launches}
    assert max(Counter(compiled.values()).values()) == (2 if "rotation" in call else 1)  # both ways by one kernel


def test_a_row_that_fits_into_no_program_goes_to_torch():
    with dry_launches(90) as launches:
        dry_norm(8200, BF16, trained=True)  # 8200: no multiple of 16
        dry_norm(16_384, BF16, trained=True)
        assert launches == []
        dry_norm(8192, BF16, trained=True)
        assert len(launches) == 2
