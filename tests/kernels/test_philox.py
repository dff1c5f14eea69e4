"""Dropout's mask: Philox as published, the same in plain torch and in Triton."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.kernels.philox import Dropout, dropout

SEED = 0xFEDCBA9876543210
CASES = [(1, 1), (3, 7), (5, 8), (4, 129), (300, 20), (2, 70_000), (9, 16_384)]


def philox(counter: list[Any], key: list[int], rounds: int = 7) -> list[Any]:
    """Philox4x32 in NumPy, written from the paper: counters and keys of 32 bits in uint64."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(rounds):
        product0, product1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ k[0],
            product1 & low,
            (product0 >> np.uint64(32)) ^ c[3] ^ k[1],
            product0 & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def expected_mask(drop: Dropout, rows: int, columns: int) -> np.ndarray:
    row = np.arange(rows, dtype=np.uint64)[:, None]
    column = np.arange(columns, dtype=np.uint64)[None, :]
    counter = [column // 8, row, np.zeros_like(row), np.zeros_like(row)]
    words = [
        np.broadcast_to(word, (rows, columns)) for word in philox(counter, [drop.seed & 0xFFFFFFFF, drop.seed >> 32])
    ]
    word = np.choose((column % 8 // 2).astype(int) + np.zeros((rows, 1), int), words)
    draw = np.where(column % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))
    return draw >= drop.threshold


def triton_mask(threshold: int, seed: int, rows: int, columns: int) -> list[list[bool]]:
    """In the interpreter's process: what the kernel keeps of a matrix of ones."""
    from tunesmith.kernels.lora import triton_backend

    return (triton_backend.drop(torch.ones(rows, columns), Dropout(threshold, seed)) > 0).tolist()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_this_files_philox_gives_the_published_words(counter: list[int], key: list[int], words: str) -> None:
    """Random123's kat_vectors, philox4x32 with 7 rounds."""
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == words


@pytest.mark.parametrize(("rows", "columns"), CASES)
def test_the_mask_is_philox(rows: int, columns: int) -> None:
    drop = Dropout(threshold=19_661, seed=SEED)
    kept = drop.keep(rows, columns, torch.device("cpu")).numpy()
    assert np.array_equal(kept, expected_mask(drop, rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [case for case in CASES if case[0] * case[1] < 10_000])
def test_triton_draws_the_same_mask(rows: int, columns: int, interpreter: Any) -> None:
    drop = Dropout(threshold=19_661, seed=SEED)
    kept = interpreter.run(triton_mask, rows=rows, columns=columns, threshold=drop.threshold, seed=SEED)
    assert np.array_equal(np.array(kept), expected_mask(drop, rows, columns))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_dropped_elements_is_p(p: float) -> None:
    drop = dropout(p, 3)
    assert drop is not None
    kept = drop.keep(1000, 1000, torch.device("cpu"))
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 1e6) + 2**-17
    assert abs(drop.keep_scale * (1 - p) - 1) < 2**-16 / (1 - p)
    columns, rows = kept.float().mean(0), kept.float().mean(1)  # none stands out: each draw of a word is used
    limit = 6 * math.sqrt(p * (1 - p) / 1000)
    assert (columns - (1 - p)).abs().max() < limit
    assert (rows - (1 - p)).abs().max() < limit


@pytest.mark.parametrize("seed", [4, 3 + 2**32])
def test_each_half_of_the_seed_changes_the_mask(seed: int) -> None:
    one = Dropout(32_768, seed=3).keep(20, 64, torch.device("cpu"))
    other = Dropout(32_768, seed).keep(20, 64, torch.device("cpu"))
    assert 0.4 < (one == other).float().mean() < 0.6


def test_a_p_of_zero_in_16_bits_drops_nothing_and_needs_no_seed() -> None:
    assert dropout(0.0, None) is None
    assert dropout(7e-6, None) is None
    assert dropout(8e-6, 0) == Dropout(1, 0)


@pytest.mark.parametrize(
    ("p", "seed", "words"),
    [
        (1.0, 0, "dropout_p=1.0 is not in"),
        (-0.1, 0, "dropout_p=-0.1 is not in"),
        (math.nan, 0, "dropout_p=nan is not in"),
        (0.999999, 0, "would drop everything"),
        (0.1, None, "needs a seed"),
        (0.1, -1, "seed=-1 is not in"),
        (0.1, 2**64, "seed=18446744073709551616 is not in"),
    ],
)
def test_bad_input_is_refused_with_its_numbers(p: float, seed: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dropout(p, seed)
