"""Picture files to RGB, as people see them in an image viewer."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from sat_lora.cogvlm.inputs.picture_kinds import (
    CONVERT,
    DAMAGED,
    FORMATS,
    SUFFIXES,
    UNREAD_SUFFIXES,
    built_formats,
    kind_by_mark,
    kind_of_content,
)
from sat_lora.cogvlm.inputs.picture_view import as_seen, grey_step_of
from sat_lora.errors import DataError
from sat_lora.files.foreign import MEBIBYTE, open_file
from sat_lora.printable import printable

__all__ = [
    "CONVERT",
    "FORMATS",
    "MAX_PIXELS",
    "SUFFIXES",
    "UNREAD_SUFFIXES",
    "as_seen",
    "file_limit",
    "read_animation",
    "read_picture",
    "suffix_of",
]

MAX_PIXELS = 89_478_485
"""Above it Pillow itself warns of a decompression bomb; a decoded picture of so many takes 0.4 GB."""

ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
"""Formats whose further pictures are shown one after the other; those of others are pages, sizes or thumbnails."""
LONGEST = 60.0  # seconds of an animation that are gone through
ANIMATED_PIXELS = 1 << 29
"""The most pixels of all pictures of an animation: 2,000 of 500 x 500. A small file can have any number of them."""
_SHORTEST = 0.02  # seconds of a picture of an animation; viewers take what is shorter for:
_USUAL = 0.1

_SCANS = 100  # the usual progressive JPEG has ten
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


def file_limit(max_pixels: int = MAX_PIXELS) -> int:
    """Return how many bytes a picture file may have: room for so many pixels of four unpacked channels of 16 bits."""
    return 8 * max_pixels + 16 * MEBIBYTE


def read_picture(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Return the picture in a file, or in a file's content, as an RGB image that `as_seen` gives.

    name: what an error calls it; None is the path. Only regular files of at most `file_limit(max_pixels)` bytes are
    opened, and nothing is decoded of a picture whose header tells of more than `max_pixels`.
    Raises DataError if it cannot be read, whatever the reason.
    """
    (picture,) = _read(source, _still, max_pixels, name)
    return picture


def read_animation(
    source: str | Path | bytes,
    choose: Callable[[Sequence[float]], Sequence[int]],
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> list[Image.Image]:
    """Return those pictures of an animation that `choose` takes, or the one picture that the file has.

    choose: gets the seconds at which each picture begins, of the first LONGEST seconds, and returns numbers of
    pictures, ascending. The rest is as in `read_picture`.
    """
    return _read(source, partial(_chosen, choose=choose), max_pixels, name)


def _read(
    source: str | Path | bytes,
    take: Callable[[Image.Image, int], list[Image.Image]],
    max_pixels: int,
    name: str | None,
) -> list[Image.Image]:
    """Return what `take` makes of the opened file, whose first picture has not been decoded, and its step of grey."""
    content = None
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source, file_limit(max_pixels)) as file:
            content = file.read(400)
            file.seek(0)
            with _limited_pillow(max_pixels), Image.open(file, formats=built_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ValueError(
                        f"{width} x {height} pixels are more than --max-pixels {max_pixels}; make it smaller, or raise "
                        "the option"
                    )
                if image.format in ("JPEG", "MPO"):
                    _check_scans(file)
                grey_step = grey_step_of(image)
                _check_end(file, image.format)
                return take(image, grey_step)
    # Pillow's decoders raise whatever damaged bytes lead them to, and one that is missed here stops a rank.
    except Exception as error:
        problem: Exception | str = error
        if isinstance(error, Image.UnidentifiedImageError):
            problem = f"it is {kind_of_content(content or b'')}"
        elif isinstance(error, OSError) and error.strerror:
            problem = error.strerror  # without the path, which stands before
        elif not isinstance(error, (ValueError, MemoryError, Image.DecompressionBombError)):
            kind = kind_by_mark(content or b"")
            problem = f"{error}; {DAMAGED.format(kind)}" if kind else error
        elif isinstance(error, MemoryError):
            problem = "there is not enough memory for it"
        shown = printable(name or (source if not isinstance(source, bytes) else "an image"))
        raise DataError(f"{shown}: cannot be read as an image: {printable(problem)}") from error


def _still(image: Image.Image, grey_step: int) -> list[Image.Image]:
    image.load()
    return [as_seen(image, grey_step=grey_step)]


def _chosen(
    image: Image.Image, grey_step: int, choose: Callable[[Sequence[float]], Sequence[int]]
) -> list[Image.Image]:
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    if count == 1:
        return _still(image, grey_step)
    width, height = image.size
    if count * width * height > ANIMATED_PIXELS:
        raise ValueError(
            f"an animation of {count:,} pictures of {width} x {height} pixels, more than {ANIMATED_PIXELS:,} together; "
            "make it smaller, or write it as a film"
        )
    times: list[float] = []
    end = 0.0
    for number in range(count):
        image.seek(number)
        image.load()  # some decoders know only then how long it is shown
        times.append(end)
        duration = float(image.info.get("duration") or 0) / 1000
        end += duration if duration >= _SHORTEST else _USUAL
        if end >= LONGEST:
            break
    wanted = choose(times)
    pictures: dict[int, Image.Image] = {}
    for number in sorted({*wanted}):
        image.seek(number)
        image.load()
        pictures[number] = as_seen(image.copy(), grey_step=grey_step)
    return [pictures[number] for number in wanted]


_END_MARKS = {
    "PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";", "WEBP": None, "AVIF": None,
}  # fmt: skip
_ZEROS = 512  # bytes at the end of a compressed picture that no encoder writes


def _check_end(file: BinaryIO, kind: str) -> None:
    """Raise ValueError if a compressed picture ends in zeros and not as it should.

    A download that did not end has left them, and decoders make a picture of it.
    """
    if kind not in _END_MARKS:
        return
    place = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _ZEROS))
    if not any(file.read(_ZEROS)) and size > _ZEROS:
        file.seek(0)
        filled = file.read().rstrip(b"\0")
        mark = _END_MARKS[kind]
        if mark is None or not (filled.endswith(mark) or (kind == "MPO" and mark in filled)):
            zeros = size - len(filled)
            kind = kind_by_mark(filled[:400]) or kind
            raise ValueError(f"its last {zeros:,} of {size:,} bytes are zeros; {DAMAGED.format(kind)}")
    file.seek(place)


def _check_scans(file: BinaryIO) -> None:
    """Raise ValueError if a JPEG goes over its pixels more often than any program writes it: 14 bytes are one scan."""
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    if content.count(b"\xff\xda") <= _SCANS:  # those of its thumbnails and further pictures among them
        return
    scans = 0
    place = 0
    while match := _MARKER.search(content, place):
        kind = content[match.end() - 1]
        place = match.end()
        if kind == 0xD9:  # the end of the first picture
            return
        scans += kind == 0xDA
        if scans > _SCANS:
            raise ValueError(f"a JPEG of more than {_SCANS} scans; save it anew")
        place += 0 if kind in (0x01, 0xD8) else int.from_bytes(content[place : place + 2], "big")


def suffix_of(content: bytes) -> str:
    """Return the suffix of SUFFIXES that fits the content of a picture file; .png where no decoder reads it."""
    try:
        with _limited_pillow(MAX_PIXELS), Image.open(io.BytesIO(content), formats=built_formats()) as image:
            suffixes = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}
            return suffixes.get(image.format, f".{image.format.lower()}")
    except Exception:  # as of `read_picture`
        return ".png"


@contextmanager
def _limited_pillow(max_pixels: int) -> Iterator[None]:
    """Let Pillow have that limit inside, for pictures inside of pictures (icons) too, and no warnings.

    It warns of the limit, and of metadata, which no viewer minds either.
    """
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
