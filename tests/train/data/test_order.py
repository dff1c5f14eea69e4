import itertools

import numpy as np
import pytest

from tunesmith.train.data.order import GlobalOrder, split_global_batch


def stream(order, num_steps, num_samples_total=None):
    return [id_ for step in range(num_steps) for id_ in order.global_batch(step, num_samples_total)]


@pytest.mark.parametrize("num_sequences", [1, 5, 8, 37])
@pytest.mark.parametrize("global_batch_size", [1, 4, 8, 64])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_holds_every_sequence_once(num_sequences, global_batch_size, grouped):
    lengths = np.random.default_rng(0).integers(1, 99, num_sequences) if grouped else None
    order = GlobalOrder(num_sequences, global_batch_size=global_batch_size, seed=3, lengths=lengths)
    num_samples = order.num_samples(3)
    ids = stream(order, order.steps_for(3), num_samples)
    assert len(ids) == order.steps_for(3) * global_batch_size
    assert ids[num_samples:] == [-1] * (len(ids) - num_samples)
    epochs = [ids[i : i + num_sequences] for i in range(0, num_samples, num_sequences)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_sequences))] * 3


def test_epochs_differ_and_seeds_differ():
    order = GlobalOrder(50, global_batch_size=50, seed=0)
    assert order.global_batch(0) != order.global_batch(1)
    assert order.global_batch(0) != GlobalOrder(50, global_batch_size=50, seed=1).global_batch(0)
    assert order.global_batch(0) == GlobalOrder(50, global_batch_size=50, seed=0).global_batch(0)
    assert GlobalOrder(5, global_batch_size=5, seed=0, shuffle=False).global_batch(1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_can_be_asked_for_without_those_before_it(grouped):
    lengths = np.arange(37) if grouped else None
    whole = GlobalOrder(37, global_batch_size=8, seed=0, lengths=lengths)
    batches = [whole.global_batch(step) for step in range(20)]
    for step in (19, 3, 11, 4):
        assert GlobalOrder(37, global_batch_size=8, seed=0, lengths=lengths).global_batch(step) == batches[step]
        assert whole.global_batch(step) == batches[step]  # also backwards


@pytest.mark.parametrize(
    ("num_sequences", "global_batch_size", "epochs", "steps"),
    [(8, 4, 1, 2), (9, 4, 1, 3), (9, 4, 4, 9), (10, 4, 0.1, 1), (10, 1, 0.3, 3), (3, 64, 1, 1), (10, 4, 1.5, 4)],
)
def test_steps_are_counted_over_all_epochs(num_sequences, global_batch_size, epochs, steps):
    assert GlobalOrder(num_sequences, global_batch_size=global_batch_size, seed=0).steps_for(epochs) == steps


def test_epoch_at():
    order = GlobalOrder(16, global_batch_size=4, seed=0)
    assert [order.epoch_at(step) for step in (0, 1, 4)] == [0.0, 0.25, 1.0]


def test_length_groups_leave_little_padding():
    lengths = np.random.default_rng(0).integers(10, 500, 1003)
    waste = {}
    for name, given in (("grouped", lengths), ("shuffled", None)):
        order = GlobalOrder(1003, global_batch_size=8, seed=0, lengths=given)
        batches = [lengths[order.global_batch(step)] for step in range(order.steps_for(3) - 1)]  # across epochs too
        waste[name] = 1 - sum(map(np.sum, batches)) / sum(batch.max() * len(batch) for batch in batches)
    assert waste["grouped"] < 0.06 < 0.3 < waste["shuffled"]


def test_length_groups_are_not_in_order_of_length():
    lengths = np.arange(800)
    order = GlobalOrder(800, global_batch_size=8, seed=0, lengths=lengths)
    means = [lengths[order.global_batch(step)].mean() for step in range(100)]
    assert abs(np.corrcoef(means, range(100))[0, 1]) < 0.3


@pytest.mark.parametrize("unpacked", [False, True])
def test_the_global_batch_is_the_same_for_every_split(unpacked):
    lengths = np.random.default_rng(0).integers(1, 99, 64)
    ids = [*GlobalOrder(64, global_batch_size=24, seed=0).global_batch(0)[:22], -1, -1]
    for world_size, micro_batch_size in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        if 24 % (world_size * micro_batch_size):
            continue
        ranks = [
            split_global_batch(
                ids, lengths if unpacked else None, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        assert {len(rank) for rank in ranks} == {24 // (world_size * micro_batch_size)}  # every rank as many forwards
        assert {len(micro_batch) for rank in ranks for micro_batch in rank} == {micro_batch_size}
        assert sorted(id_ for rank in ranks for micro_batch in rank for id_ in micro_batch) == sorted(ids)


def test_unpacked_micro_batches_hold_like_lengths_and_ranks_neighbouring_ones():
    lengths = np.array([10, 80, 11, 81, 12, 82, 13, 83])
    ids = list(range(8))
    split = [split_global_batch(ids, lengths, micro_batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert split == [[[7, 5], [6, 4]], [[3, 1], [2, 0]]]


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="10 sequences don't divide into 4 x 2 ranks"):
        split_global_batch(list(range(10)), None, micro_batch_size=4, rank=0, world_size=2)
