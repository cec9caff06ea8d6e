"""Folders of images whose file names are their answers."""

from collections.abc import Sequence
from pathlib import Path

from sat_lora.data.folders import find_images
from sat_lora.data.layouts import check_layout
from sat_lora.data.reading import Reading
from sat_lora.data.samples import DataCounts, Item

WHOSE = "file names are the answers"
READS_FOLDERS = True


def fits(path: Path) -> bool:
    """Return True: what no other reader takes is looked at by `read`, which says what it is."""
    return True


def read(path: Path, reading: Reading, counts: DataCounts, given: Sequence[Path]) -> list[Item]:
    """Return the items of a folder. Raises DataError if there is none, or it is plainly of another layout."""
    images = find_images([path], counts.unused, reading.run_folder)
    if not reading.names_are_answers and reading.data_format != "images":
        check_layout(path, images, given=given)
    counts.labelled_by_name += len(images)
    counts.layouts[WHOSE] += len(images)
    return [Item(image, image.stem) for image in images]
