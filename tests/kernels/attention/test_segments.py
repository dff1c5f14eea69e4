"""Where segments begin, and the groups in which a CPU computes them."""

import pytest
import torch

from tunesmith.kernels.attention.segments import LEAST_FILL, Segments

ROWS = [[5, 1, 7, 11], [24], [20, 4]]


def test_segments_say_where_each_token_belongs() -> None:
    segments = Segments.of_rows(ROWS)
    assert segments.shape == (3, 24)
    assert segments.cu_seqlens.tolist() == [0, 5, 6, 13, 24, 48, 68, 72]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.max_length == 24
    assert segments.numbers.tolist() == [[0] * 5 + [1] + [2] * 7 + [3] * 11, [4] * 24, [5] * 20 + [6] * 4]


def test_every_token_has_one_place_among_the_groups_and_repetitions_are_known() -> None:
    segments = Segments.of_rows(ROWS)
    assert [(group.num_segments, group.length) for group in segments.groups] == [
        (2, 24),
        (1, 11),
        (1, 7),
        (2, 5),
        (1, 1),
    ]
    rows = torch.cat([group.rows for group in segments.groups])
    assert torch.equal(rows[segments.places], torch.arange(72))
    for group in segments.groups:
        starts = group.rows.view(group.num_segments, group.length)
        repeated = torch.zeros(len(group.rows), dtype=torch.bool)
        repeated[group.repeated] = True
        assert torch.equal(repeated.view_as(starts)[:, 1:], starts[:, 1:] == starts[:, :-1])
        assert (~repeated.view_as(starts)).sum(1).min() >= LEAST_FILL * group.length


@pytest.mark.parametrize(("rows", "words"), [([[3], [4]], r"\[3, 4\] tokens a row"), ([[3, 0]], "shortest of 0")])
def test_lengths_that_fill_no_rectangle_are_refused(rows: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Segments.of_rows(rows)
