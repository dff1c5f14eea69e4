"""Micro batches against rows built by hand: label shift, boundaries between packed records, padding."""

import numpy as np
import pytest
import torch

from tunesmith.train.config.config import Packing
from tunesmith.train.data.example import Example
from tunesmith.train.data.store import IGNORE_INDEX, TokenStore, write_store

PAD = 2  # also the token that ends every record here: padding must not be told by its id
X = IGNORE_INDEX
IDS = [[10, 11, 12, 13, PAD], [20, 21, PAD], [30, 31, 32, PAD]]
WEIGHTS = [[0, 0, 1, 1, 1], [0, 0.5, 0.5], [0, 0, 0, 3]]


@pytest.fixture
def make_store(tmp_path):
    def make(packing=Packing.best_fit, sequence_length=8, ids=IDS, weights=WEIGHTS):
        folder = tmp_path / "store"
        examples = [
            Example(f"data.jsonl:{number}", np.array(row, dtype=np.int32), np.array(weight, dtype=np.float32))
            for number, (row, weight) in enumerate(zip(ids, weights, strict=True), start=1)
        ]
        write_store(folder, examples, sequence_length=sequence_length, packing=packing)
        return TokenStore(folder, sequence_length=sequence_length, packing=packing)

    return make


def test_a_packed_micro_batch_is_what_a_hand_would_write(make_store):
    store = make_store()  # the records of 5 and 3 tokens fill one sequence, that of 4 leaves half of another empty
    batch = store.batch([0, 1], pad_token_id=PAD)
    assert batch.inputs["input_ids"].tolist() == [
        [10, 11, 12, 13, PAD, 20, 21, PAD],
        [30, 31, 32, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.labels.tolist() == [[X, 12, 13, PAD, X, 21, PAD, X], [X, X, PAD, X, X, X, X, X]]
    assert batch.weights.tolist() == [[0, 1, 1, 1, 0, 0.5, 0.5, 0], [0, 0, 3, 0, 0, 0, 0, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.target_rows.tolist() == [1, 2, 3, 5, 6, 10]
    assert (batch.num_target_tokens, batch.target_weight, batch.num_tokens) == (6, 7.0, 12)
    assert (batch.segments.shape, batch.segments.lengths) == ((2, 8), (5, 3, 4, 4))


def test_an_unpacked_micro_batch_is_what_a_hand_would_write(make_store):
    batch = make_store(Packing.none).batch([1, 0], pad_token_id=PAD)
    assert batch.inputs["input_ids"].tolist() == [
        [20, 21, PAD, PAD, PAD, PAD, PAD, PAD],
        [10, 11, 12, 13, PAD, PAD, PAD, PAD],
    ]
    assert batch.labels.tolist() == [[21, PAD, X, X, X, X, X, X], [X, 12, 13, PAD, X, X, X, X]]
    assert batch.inputs["position_ids"].tolist() == [list(range(8))] * 2
    assert batch.num_tokens == 8
    assert batch.segments.lengths == (3, 5, 5, 3)


def test_padding_is_cut_into_segments_that_cost_little(make_store):
    batch = make_store(sequence_length=200).batch([0, -1], pad_token_id=PAD)
    assert batch.segments.lengths == (5, 4, 3, 64, 64, 60, 64, 64, 64, 8)


@pytest.mark.parametrize("packing", list(Packing))
def test_dtypes_and_derived_tensors(packing, make_store):
    batch = make_store(packing).batch([0, -1, 1], pad_token_id=0)
    for tensor in (batch.inputs["input_ids"], batch.inputs["position_ids"], batch.labels, batch.target_rows):
        assert tensor.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    flat = batch.labels.reshape(-1)
    assert torch.equal(torch.nonzero(flat != IGNORE_INDEX).reshape(-1), batch.target_rows)
    assert torch.equal(torch.nonzero(batch.weights.reshape(-1)).reshape(-1), batch.target_rows)


def test_an_empty_sequence_learns_nothing(make_store):
    packed = make_store().batch([-1, 0], pad_token_id=PAD)
    assert packed.inputs["input_ids"][0].tolist() == [PAD] * 8
    assert packed.labels[0].tolist() == [X] * 8
    assert packed.inputs["position_ids"][0].tolist() == list(range(8))


@pytest.mark.parametrize("packing", list(Packing))
def test_a_micro_batch_of_empty_sequences_has_no_target(packing, make_store):
    batch = make_store(packing).batch([-1, -1], pad_token_id=PAD)
    assert batch.labels.unique().tolist() == [X]
    assert (batch.num_target_tokens, batch.target_weight, batch.num_tokens) == (0, 0.0, 0)
    assert batch.target_rows.shape == (0,)


@pytest.mark.parametrize(("lengths", "sequence_length", "width"), [([3], 64, 8), ([9, 3], 64, 16), ([9], 12, 12)])
def test_unpacked_width_is_the_longest_rounded_up(lengths, sequence_length, width, make_store):
    ids = [list(range(length)) for length in lengths]
    weights = [[0] + [1] * (length - 1) for length in lengths]
    store = make_store(Packing.none, sequence_length, ids, weights)
    assert store.batch(range(len(ids)), pad_token_id=PAD).inputs["input_ids"].shape == (len(ids), width)


def test_a_first_token_is_never_a_label(make_store):
    """Its label would sit on the last token of the record before it."""
    store = make_store(weights=[[1] * len(row) for row in IDS])
    batch = store.batch([0], pad_token_id=PAD)
    assert batch.labels.tolist() == [[11, 12, 13, PAD, X, 21, PAD, X]]
    assert store.num_target_tokens == sum(len(row) - 1 for row in IDS)


def test_packed_and_unpacked_hold_the_same_labels(make_store, tmp_path):
    random = np.random.default_rng(0)
    ids = [random.integers(3, 99, length) for length in random.integers(2, 30, 100)]
    weights = [random.integers(0, 2, len(row)) * random.random() for row in ids]
    found = []
    for packing in Packing:
        store = make_store(packing, 64, ids, weights)
        pairs = []
        for first in range(0, store.num_sequences, 4):
            batch = store.batch(range(first, min(first + 4, store.num_sequences)), pad_token_id=PAD)
            tensors = (batch.inputs["input_ids"], batch.labels, batch.weights, batch.inputs["position_ids"])
            pairs += zip(*(tensor.reshape(-1)[batch.target_rows].tolist() for tensor in tensors), strict=True)
        found.append(sorted(pairs))
        (tmp_path / "store").rename(tmp_path / packing)
    assert found[0] == found[1]


def test_counts(make_store):
    store = make_store()
    assert (store.num_sequences, store.num_records, store.num_tokens, store.num_target_tokens) == (2, 3, 12, 6)
    assert (store.max_length, store.fill) == (5, 0.75)
    assert store.places() == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:3"]
    assert store.record(1)[0].tolist() == IDS[1]


def test_to_moves_every_tensor(make_store):
    batch = make_store().batch([0], pad_token_id=PAD).to("meta")
    tensors = [*batch.inputs.values(), *batch.columns.values(), batch.labels, batch.target_rows]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.num_tokens == 8


@pytest.mark.parametrize("packing", list(Packing))
def test_parts_and_columns_are_what_a_hand_would_write(packing, tmp_path):
    """Two answers to one question are one example: positions restart, and no label crosses from one to the other."""
    pair = Example(
        "data.jsonl:1",
        np.array([10, 11, PAD, 10, 12, 13, PAD], dtype=np.int32),
        np.array([1, 1, 1, 1, 1, 1, 1], dtype=np.float32),
        {"side": np.array([0, 1, 1, 0, -1, -1, -1], dtype=np.int8)},
        (0, 3),
    )
    alone = Example("data.jsonl:2", np.array([20, 21]), np.array([0, 1]), {"side": np.array([0, 1], dtype=np.int8)})
    write_store(tmp_path / "store", [pair, alone], sequence_length=9, packing=packing)
    store = TokenStore(tmp_path / "store", sequence_length=9, packing=packing)
    assert store.is_isolated
    if packing is Packing.best_fit:
        batch = store.batch([0], pad_token_id=PAD)
        assert batch.labels.tolist() == [[11, PAD, X, 12, 13, PAD, X, 21, X]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
        assert batch.columns["example"].tolist() == [[0] * 7 + [1] * 2]
        assert batch.of_targets("side").tolist() == [1, 1, -1, -1, -1, 1]
    else:
        batch = store.batch([1, -1, 0], pad_token_id=PAD)
        assert batch.labels.tolist() == [[21, *[X] * 7], [X] * 8, [11, PAD, X, 12, 13, PAD, X, X]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, *range(6)], list(range(8)), [0, 1, 2, 0, 1, 2, 3, 0]]
        assert batch.columns["example"].tolist() == [[0, 0, *[-1] * 6], [-1] * 8, [1] * 7 + [-1]]
    assert batch.num_examples == 2
    assert batch.of_targets("example").unique().tolist() == [0, 1]
