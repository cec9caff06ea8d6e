"""Boxes as pixels or shares, as CogVLM's text, and on a picture."""

import pytest
from PIL import Image

from sat_lora.cogvlm.inputs.boxes import boxes_in, boxes_text, draw_boxes
from sat_lora.errors import DataError


@pytest.mark.parametrize(
    "boxes, size, text",
    [
        ([(0, 0, 1, 1)], None, "[[000,000,999,999]]"),
        ([(0, 0, 640, 480)], (640, 480), "[[000,000,999,999]]"),
        ([(0.25, 0.5, 0.75, 0.999)], None, "[[250,500,750,999]]"),
        ([(64, 48, 320, 240), (0, 0, 1, 1)], (640, 480), "[[100,100,500,500;000,000,001,002]]"),
        ([(0.29, 0.57, 0.58, 0.58)], None, "[[290,570,580,580]]"),
    ],
)
def test_boxes_are_thousandths_of_three_digits(boxes, size, text):
    assert boxes_text(boxes, size) == text


@pytest.mark.parametrize("size", [None, (490, 490), (1344, 333), (1, 2)])
def test_a_box_comes_back_to_within_a_thousandth(size):
    width, height = size or (1, 1)
    box = (0.123 * width, 0.4567 * height, 0.789 * width, height)
    ((back,),) = boxes_in(f"The dog [[5]] {boxes_text([box], size)} runs.", size)
    for number, other, side in zip(box, back, (width, height, width, height)):
        assert number - side / 1000 - 1e-9 <= other <= number + 1e-9


def test_every_text_of_thousandths_is_the_same_after_the_way_back():
    for number in range(0, 999):
        text = f"[[{number:03d},000,999,{number + 1:03d}]]"
        ((box,),) = boxes_in(text)
        assert boxes_text([box]) == text
        ((box,),) = boxes_in(text, (640, 481))
        assert boxes_text([box], (640, 481)) == text


def test_the_boxes_of_a_phrase_stay_together():
    phrases = boxes_in("two cats [[000,000,100,100;500,500,600,600]] and a dog [[1,2,3,4]], not [[900,0,1,1]] or [1,2]")
    assert [len(boxes) for boxes in phrases] == [2, 1]


@pytest.mark.parametrize(
    "box, size, words",
    [
        ((-1, 0, 5, 5), (10, 10), "outside of the picture of 10 x 10 pixels"),
        ((0, 0, 11, 5), (10, 10), "outside of the picture of 10 x 10 pixels"),
        ((0, 0, 300, 200), None, "outside of the shares 0 to 1; pixels need the size"),
        ((5, 5, 5, 9), (10, 10), "is empty"),
        ((0.5, 0.5, 0.2, 0.2), None, "is empty; wanted left < right"),
        ((0, 0, 1), None, "none of four numbers"),
        ((0, 0, float("nan"), 1), None, "none of four numbers"),
        ((0, 0, "1", 1), None, "none of four numbers"),
        ((0, 0, 1, 1), (0, 5), "has no boxes"),
    ],
)
def test_a_box_that_is_none_or_outside_is_an_error(box, size, words):
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        boxes_text([box], size)
    with pytest.raises(DataError, match="no box"):
        boxes_text([], size)


def test_boxes_are_drawn_where_they_are():
    image = Image.new("L", (100, 50), 255)
    drawn = draw_boxes(image, "a dog [[100,200,500,800]]")
    assert drawn.size == image.size and drawn.mode == "RGB"
    assert drawn.getpixel((10, 10)) != (255, 255, 255) and drawn.getpixel((50, 40)) != (255, 255, 255)
    assert drawn.getpixel((30, 25)) == drawn.getpixel((5, 5)) == (255, 255, 255)
    assert draw_boxes(image, "nothing").tobytes() == image.convert("RGB").tobytes()
