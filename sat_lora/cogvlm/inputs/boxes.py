"""Boxes of grounding: from pixels or shares of a picture to the published text [[000,000,999,999]], back, and drawn."""

import math
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw

from sat_lora.errors import DataError

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, from the picture's left and top one."""

THOUSANDTHS = 1000
_BOXES = re.compile(r"\[\[(\d{1,3}(?:,\d{1,3}){3}(?:;\d{1,3}(?:,\d{1,3}){3})*)\]\]")
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0")


def boxes_text(boxes: Sequence[Sequence[float]], size: tuple[int, int] | None = None) -> str:
    """Return the boxes of one phrase as CogVLM writes them, [[x1,y1,x2,y2;x1,y1,x2,y2]] in thousandths of the picture.

    boxes: in pixels of a picture of `size` (width, height), or in shares of it, from 0 to 1, where that is None. Raises
    DataError for a box that is empty or outside of the picture, or none at all.
    """
    if not boxes:
        raise DataError("no box; give (left, top, right, bottom) of one or more")
    return "[[" + ";".join(",".join(map(_digits, share_of(box, size))) for box in boxes) + "]]"


def share_of(box: Sequence[float], size: tuple[int, int] | None = None) -> Box:
    """Return a box in shares of the picture. Raises DataError if it is none, empty, or outside of the picture."""
    shown = f"the box {repr(list(box))[:80]}"
    if len(box) != 4 or not all(_is_number(number) for number in box):
        raise DataError(f"{shown} is none of four numbers: left, top, right, bottom")
    if size is not None and min(size) < 1:
        raise DataError(f"a picture of {size[0]} x {size[1]} pixels has no boxes")
    width, height = (1, 1) if size is None else size
    left, top, right, bottom = box
    what = "the shares 0 to 1" if size is None else f"the picture of {width} x {height} pixels"
    if not (0 <= left <= width and 0 <= right <= width and 0 <= top <= height and 0 <= bottom <= height):
        advice = "; pixels need the size of the picture" if size is None and max(box) > 1 else ""
        raise DataError(f"{shown} lies outside of {what}{advice}")
    if left >= right or top >= bottom:
        raise DataError(f"{shown} is empty; wanted left < right and top < bottom (x, y, width, height is another form)")
    return left / width, top / height, right / width, bottom / height


def boxes_in(text: str, size: tuple[int, int] | None = None) -> list[list[Box]]:
    """Return the boxes of each [[...]] in a text: in shares of the picture, or in pixels of `size` (width, height).

    What looks like boxes and is none, such as [[999,0,1,1]], is left out.
    """
    width, height = (1, 1) if size is None else size
    phrases = []
    for match in _BOXES.finditer(text):
        numbers = [[int(number) for number in box.split(",")] for box in match[1].split(";")]
        boxes = [box for box in numbers if box[0] <= box[2] and box[1] <= box[3]]
        scaled = [
            (x1 * width / THOUSANDTHS, y1 * height / THOUSANDTHS, x2 * width / THOUSANDTHS, y2 * height / THOUSANDTHS)
            for x1, y1, x2, y2 in boxes
        ]
        if scaled:
            phrases.append(scaled)
    return phrases


def draw_boxes(image: Image.Image, text: str) -> Image.Image:
    """Return a copy of the image, in RGB, with the boxes of a text on it: one colour for those of a phrase."""
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width = max(1, round(min(image.size) / 100))
    for number, boxes in enumerate(boxes_in(text, image.size)):
        for box in boxes:
            pen.rectangle(box, outline=_COLOURS[number % len(_COLOURS)], width=width)
    return drawn


def _digits(share: float) -> str:
    return f"{min(THOUSANDTHS - 1, math.floor(share * THOUSANDTHS + 1e-9)):03d}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
