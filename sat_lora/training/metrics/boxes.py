"""Metrics of grounding: how well the boxes of an answer lie on the right ones."""

import itertools
from collections.abc import Sequence

from sat_lora.cogvlm.inputs.boxes import boxes_in
from sat_lora.training.metrics.scores import best_of

IOU_THRESHOLD = 0.5
"""The overlap from which a box counts as found (Mao et al. 2016, arXiv:1511.02283)."""

Box = Sequence[float]


def overlap(first: Box, second: Box) -> float:
    """Return the area that two boxes share over that of both together: 0 to 1, and 0 where neither has an area."""
    width, height = (
        max(0.0, min(first[axis + 2], second[axis + 2]) - max(first[axis], second[axis])) for axis in (0, 1)
    )
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    joined = sum(areas) - width * height
    return width * height / joined if joined else 0.0


def box_iou(prediction: str, reference: str) -> float:
    """Return the mean overlap of the boxes [[x1,y1,x2,y2]] in two texts.

    Boxes are paired one to one, the largest overlap first; each one that is left over counts as 0. Of texts without any
    box it is 1.
    """
    said, right = ([box for phrase in boxes_in(text) for box in phrase] for text in (prediction, reference))
    if not said or not right:
        return float(len(said) == len(right))
    pairs = itertools.product(range(len(said)), range(len(right)))
    overlaps = sorted(((overlap(said[i], right[j]), i, j) for i, j in pairs), key=lambda pair: (-pair[0], *pair[1:]))
    total = 0.0
    taken: set[tuple[str, int]] = set()
    for share, i, j in overlaps:
        if taken.isdisjoint({("said", i), ("right", j)}):
            taken |= {("said", i), ("right", j)}
            total += share
    return total / max(len(said), len(right))


def is_box_found(prediction: str, reference: str) -> float:
    """Return whether `box_iou` is at least IOU_THRESHOLD."""
    return float(box_iou(prediction, reference) >= IOU_THRESHOLD)


mean_iou = best_of(box_iou)
accuracy = best_of(is_box_found)
