"""Where deltas go, as slices."""

import pytest

from sat_lora.lora.deltas.layout import DeltaLayout


@pytest.mark.parametrize(
    "slots, gaps",
    [
        (((0, 4), (4, 8)), []),
        (((0, 4),), [slice(4, 8)]),
        (((4, 8),), [slice(0, 4)]),
        (((1, 2), (2, 3), (5, 8)), [slice(0, 1), slice(3, 5)]),
    ],
)
def test_gaps_are_the_columns_between_the_slots_and_none_is_empty(slots, gaps):
    assert DeltaLayout(slots, 8).gaps() == gaps


def test_pieces_are_columns_of_y_rows_of_b_and_columns_of_s():
    assert [*DeltaLayout(((1, 3), (5, 8)), 8).pieces(2)] == [
        (slice(1, 3), slice(0, 2), slice(0, 2)),
        (slice(5, 8), slice(2, 5), slice(2, 4)),
    ]
