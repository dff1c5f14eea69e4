import numpy as np
import pytest

from tunesmith.train.data.packing import best_fit_decreasing, exact_fit_decreasing, pack

ALGORITHMS = [best_fit_decreasing, exact_fit_decreasing, pack]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("num_records", "capacity"), [(0, 8), (1, 1), (7, 8), (500, 64), (2000, 777)])
def test_every_record_is_in_one_bin_and_none_overflows(algorithm, num_records, capacity):
    lengths = np.random.default_rng(0).integers(1, capacity + 1, num_records)
    bins = algorithm(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(num_records))
    assert all(lengths[members].sum() <= capacity for members in bins)
    assert bins == algorithm(lengths.copy(), capacity)  # deterministic


def test_best_fit_takes_the_fullest_bin():
    assert best_fit_decreasing(np.array([6, 7, 3]), 10) == [[1, 2], [0]]  # 3 fits beside 6 too
    assert best_fit_decreasing(np.array([6, 7, 3, 4]), 10) == [[1, 2], [0, 3]]


def test_exact_fits_are_found_where_best_fit_leaves_gaps():
    lengths = np.array([5, 5, 4, 4, 3, 3])  # best fit: 5 5 | 4 4 3 | 3; exact: 5 4 3 twice
    assert len(best_fit_decreasing(lengths, 12)) == 3
    assert sorted(sorted(lengths[members].tolist()) for members in pack(lengths, 12)) == [[3, 4, 5], [3, 4, 5]]


@pytest.mark.parametrize(
    "lengths",
    [
        np.clip(np.random.default_rng(1).lognormal(5, 0.8, 20_000), 5, 2048).astype(int),  # long tail, as chats have
        np.random.default_rng(2).integers(180, 330, 20_000),  # all about as long, as questions of one kind are
    ],
    ids=["lognormal", "narrow"],
)
def test_sequences_are_98_percent_full(lengths):
    bins = pack(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) >= 0.98


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
def test_lengths_that_cannot_be_packed_are_refused(algorithm, lengths):
    with pytest.raises(ValueError, match=r"don't fit into 1\.\.10"):
        algorithm(np.array(lengths), 10)
