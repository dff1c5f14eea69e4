"""Chunks of a loss on a GPU (a pretended H200): whole waves of tiles, and what is left over where it costs least."""

import pytest
import torch

from tunesmith.kernels.dry_launches import dry_launches
from tunesmith.kernels.lce import backends
from tunesmith.kernels.lce.backends import chunk_sizes
from tunesmith.kernels.lce.head import Head, make_head


def sizes(num_rows: int, hidden_size: int, vocabulary: int, trained: bool) -> list[int]:
    hidden, unembed = (
        torch.empty(size, hidden_size, dtype=torch.bfloat16, device="meta") for size in (num_rows, vocabulary)
    )
    head = make_head(unembed, None, wants_hidden=True, wants_unembed=trained, wants_bias=False, wants_stats=False)
    with dry_launches(90):
        return chunk_sizes("anchored", head, hidden)


@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "trained", "found"),
    [
        (4096 + 8, 4096, True, [4104]),  # another read of the head and its gradient: 1.5 ms
        (8192 + 8, 4096, False, [1024] * 8 + [8]),  # in the last chunk it would begin a second wave: 1.4 ms for 0.5
        (4096 + 8, 1024, False, [2048, 2056]),  # there is room in the wave
        (4096 + 300, 1024, False, [2048, 2048, 300]),  # more than a tile fills a chunk of its own
        (4096 + 100, 1024, False, [2048, 2048, 100]),  # more than the slab has room for
        (7, 4096, False, [7]),
        (0, 4096, False, []),
    ],
)
def test_what_is_left_over_goes_where_it_costs_least(num_rows, hidden_size, trained, found):
    assert sizes(num_rows, hidden_size, 128_256, trained) == found


@pytest.mark.parametrize("trained", [False, True])
def test_every_row_is_in_one_chunk_that_fits_the_slab(trained):
    slab = backends.GPU_SLAB_BYTES_TRAINABLE if trained else backends.GPU_SLAB_BYTES
    for num_rows in (*range(1, 20_000, 977), 2048, 2049, 8191, 8193):
        found = sizes(num_rows, 2048, 128_256, trained)
        assert sum(found) == num_rows
        assert max(found) * 2 * 128_256 <= slab


def test_the_slab_of_a_larger_last_chunk_is_there_from_the_first():
    head: Head = make_head(
        torch.zeros(9, 4), None, wants_hidden=True, wants_unembed=False, wants_bias=False, wants_stats=False
    )
    head.most_rows = 5
    assert head.slab(3, 8).data_ptr() == head.slab(5, 8).data_ptr()
