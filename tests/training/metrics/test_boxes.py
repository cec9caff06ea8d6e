"""The overlap of boxes by hand, and pairs of several."""

import pytest

from sat_lora.training.metrics.boxes import box_iou, is_box_found, overlap

LEFT, RIGHT, LOW = "[[000,000,100,100]]", "[[100,000,200,100]]", "[[000,050,100,150]]"


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0),  # side by side
        ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),  # without an area
        ((0, 0, 1, 1), (5, 5, 6, 6), 0),
    ],
)
def test_overlap(first, second, expected):
    assert overlap(first, second) == overlap(second, first) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        (LEFT, LEFT, 1),
        (f"the dog {LEFT}.", f"{LEFT} the dog", 1),
        (LEFT, LOW, 1 / 3),
        (LEFT, RIGHT, 0),
        (f"{LEFT} {RIGHT}", LEFT, 0.5),  # one too many
        (LEFT, "[[000,000,100,100;100,000,200,100]]", 0.5),  # one is missing
        (f"{RIGHT} {LEFT}", f"{LEFT} {RIGHT}", 1),  # in any order
        (f"{LEFT} {LEFT}", LEFT, 0.5),  # twice the same counts once
        ("none", LEFT, 0),
        ("none", "nothing", 1),
        ("[[100,100,000,000]]", LEFT, 0),  # turned around: no box
        ("[[1000,0,0,0]] [[nan,0,0,0]]", LEFT, 0),
    ],
)
def test_boxes_of_texts(prediction, reference, expected):
    assert box_iou(prediction, reference) == pytest.approx(expected)


def test_a_box_is_found_from_a_half_on():
    assert is_box_found(LEFT, "[[000,000,100,200]]") == 1
    assert is_box_found(LEFT, "[[000,000,100,202]]") == 0
