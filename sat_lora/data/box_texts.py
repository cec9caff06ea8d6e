"""Boxes that stand beside the texts of a sample, put into them where their marks are.

What reads pictures is imported where it is needed: the command line knows of these modules, too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO

from sat_lora.data.image_sources import StoredImage
from sat_lora.data.records.record import Record, RecordError
from sat_lora.errors import DataError
from sat_lora.files.foreign import open_file

BOX_MARK = "<box>"
TINY = 2  # pixels, that no box ends within
_NO_NUMBERS = (str, list, dict, bool, type(None))
EXIF_ORIENTATION = 0x0112


def boxes_problem(boxes: object) -> str | None:
    """Return what is wrong with the value of "boxes"; None if it is a list of boxes, or of lists of them."""
    if not isinstance(boxes, list) or not all(isinstance(box, list) and box for box in boxes):
        return '"boxes" is no list of [left, top, right, bottom], or of lists of those for one phrase'
    for number, phrase in enumerate(boxes, 1):
        for box in phrase if isinstance(phrase[0], list) else [phrase]:
            if not isinstance(box, list) or any(isinstance(value, _NO_NUMBERS) for value in box):
                return f'"boxes": number {number}, {json.dumps(phrase)[:60]}, is none of four numbers'
    return None


def with_boxes(record: Record, images: Sequence, size_of: Callable[[object], tuple[int, int]]) -> Record:
    """Return the record with the text of its boxes in place of each BOX_MARK, in their order.

    Boxes whose numbers are all from 0 to 1 are shares of the picture, others its pixels. size_of: gives (width, height)
    of an image. Raises RecordError where there are other marks than boxes, or a box is outside of its picture.
    """
    if not record.boxes:
        return record
    from sat_lora.cogvlm.inputs.boxes import boxes_text

    phrases = [[*box] if isinstance(box[0], list | tuple) else [box] for box in record.boxes]
    texts = [text for turn in record.history for text in turn]
    texts += ["" if record.prompt is None else record.prompt, record.answer]
    marks = sum(text.count(BOX_MARK) for text in texts)
    if marks != len(phrases):
        raise RecordError(
            f'{marks} times {BOX_MARK} in its texts, and {len(phrases)} in "boxes"; --ignore-keys boxes leaves them out'
        )
    if not images:
        raise RecordError('"boxes" without an image')
    try:
        in_shares = all(0 <= number <= 1 for boxes in phrases for box in boxes for number in box)
        size = None if in_shares else size_of(images[0])
        written = iter([boxes_text(boxes, size) for boxes in phrases])
        if size is not None and min(size) > TINY:
            _refuse_shares_among_pixels([box for boxes in phrases for box in boxes])
    except (DataError, TypeError, OSError, ValueError) as error:
        raise RecordError(f'"boxes": {error}') from None
    filled = iter([_filled(text, written) for text in texts])
    history = tuple((next(filled), next(filled)) for _ in record.history)
    prompt = next(filled)
    return replace(record, history=history, prompt=record.prompt and prompt, answer=next(filled), boxes=())


def _refuse_shares_among_pixels(boxes: Sequence[Sequence[float]]) -> None:
    """Raise DataError for a box in the outermost pixels of the corner: shares of a picture end there by mistake."""
    for box in boxes:
        if max(box) < TINY:
            shown = repr(list(box))[:80]
            raise DataError(
                f"the box {shown} has less than {TINY} pixels, and not all numbers of the sample's boxes are shares "
                "from 0 to 1; give all in shares, or all in pixels"
            )


def _filled(text: str, written) -> str:
    first, *others = text.split(BOX_MARK)
    return first + "".join(next(written) + part for part in others)


def picture_size(image: object) -> tuple[int, int]:
    """Return (width, height) of an image as it is seen, by its header. Raises DataError where it cannot be read."""
    from PIL import Image

    from sat_lora.cogvlm.inputs.picture_kinds import built_formats
    from sat_lora.cogvlm.inputs.pictures import file_limit

    try:
        content = image.read() if isinstance(image, StoredImage) else image
        source = BytesIO(content) if isinstance(content, bytes) else open_file(str(content), file_limit())
        with source as file, Image.open(file, formats=built_formats()) as picture:
            return picture.size if picture.getexif().get(EXIF_ORIENTATION, 1) < 5 else picture.size[::-1]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"its image cannot be read: {getattr(error, 'strerror', None) or error}") from error
