"""Films to the frames that CogVLM2-Video looks at: of a file, which PyAV reads (extra `video`), or of a folder.

version   frames of a file                                      between them in the text
base      24 at equal distances, of its first minute            nothing
others    the one nearest to each full second, the first 24     the frame's number, from 0 on

A folder has its pictures in the order of their names, numbers in them counted as such: all of up to 24, and of more
those that a film of one picture a second would have. A picture alone is a film of one frame.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from PIL import Image
from torch.nn import functional as F

from sat_lora.cogvlm.inputs.image import MEAN, STD
from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS, SUFFIXES, as_seen, read_picture
from sat_lora.errors import DataError
from sat_lora.files.foreign import stand_in
from sat_lora.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_FRAMES = 24
SECONDS = 60  # of a film that version `base` looks at
FILM_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpeg .mpg .ts .mts .m2ts .flv .wmv .3gp .ogv".split())
TOUCHING = "base"
"""The version whose frames have nothing between them, and one position all together."""


def load_frames(
    source: str | Path | bytes, size: tuple[int, int], version: str, *, max_pixels: int = MAX_PIXELS
) -> list[torch.Tensor]:
    """Return the frames of a film, each (3, height, width) float32: 1 to MOST_FRAMES of them.

    source: a file, a folder of pictures, or the content of a picture. size: (height, width). Raises DataError where it
    cannot be read, or has no frame.
    """
    if isinstance(source, bytes):
        return [frame_tensor(read_picture(source, max_pixels=max_pixels), size)]
    path = Path(source)
    if path.is_dir():
        return [frame_tensor(read_picture(file, max_pixels=max_pixels), size) for file in _files_of(path, version)]
    if path.suffix.lower() not in FILM_SUFFIXES:
        return [frame_tensor(read_picture(path, max_pixels=max_pixels), size)]
    return [frame_tensor(image, size) for image in _frames_of_file(path, version, max_pixels)]


def frame_tensor(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Return a frame (3, height, width): its short side as long as that of `size`, and the middle of it.

    The aspect ratio is kept, unlike that of the images of other families. Bilinear, without antialiasing.
    """
    pixels = torch.from_numpy(numpy.asarray(as_seen(image), dtype=numpy.float32) / 255.0).permute(2, 0, 1)
    pixels = (pixels - MEAN) / STD
    height, width = pixels.shape[1:]
    side = max(size)
    if width < height:
        scaled = (max(side, int(height / width * side)), side)
    else:
        scaled = (side, max(side, int(width / height * side)))
    pixels = F.interpolate(pixels[None], size=scaled, mode="bilinear", align_corners=False)[0]
    top = round((scaled[0] - size[0]) / 2)
    left = round((scaled[1] - size[1]) / 2)
    return pixels[:, top : top + size[0], left : left + size[1]]


def chosen_frames(times: Sequence[float], version: str) -> list[int]:
    """Return the numbers of the frames to look at. times: in seconds, of all frames of a film, ascending.

    Version `base` takes a frame more than once where there are fewer than it looks at.
    """
    if not times:
        return []
    if version == TOUCHING:
        count = sum(time - times[0] < SECONDS for time in times)
        return numpy.linspace(0, count - 1, MOST_FRAMES, dtype=int).tolist()
    numbers = []
    for second in range(min(MOST_FRAMES, round(times[-1]) + 1)):
        numbers.append(min(range(len(times)), key=lambda number: abs(times[number] - second)))
    return numbers


def with_frames(parts: Sequence[str], counts: Sequence[int], version: str) -> tuple[str, ...]:
    """Return the texts around the frames, from those around the films. counts: how many frames each film has.

    One film lies between any two of `parts`, which `build_sample` takes.
    """
    texts = [parts[0]]
    for count, text in zip(counts, parts[1:], strict=True):
        numbers = ["" if version == TOUCHING else str(number) for number in range(count)]
        texts += numbers[:-1]
        texts.append((numbers[-1] if numbers else "") + text)
    return tuple(texts)


def _files_of(folder: Path, version: str) -> list[Path]:
    try:
        names = [entry.name for entry in os.scandir(folder) if Path(entry.name).suffix.lower() in SUFFIXES]
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be read: {error.strerror}") from error
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise DataError(f"{printable(folder)}: no pictures in it; a folder has the frames of a film as pictures")
    names.sort(key=_with_numbers)
    numbers = [*range(len(names))]
    if len(names) > MOST_FRAMES:
        numbers = chosen_frames([*map(float, numbers)], version)
    return [folder / names[number] for number in numbers]


def _with_numbers(name: str) -> list[str | int]:
    """Return what names are sorted by: texts and numbers in turn."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def _frames_of_file(path: Path, version: str, max_pixels: int) -> "Iterator[Image.Image]":
    """Yield the frames of a file. It is gone through twice: for the times, then for the pictures."""
    instead = stand_in(path) if path.exists() else "there is no such file"
    if instead is not None:
        raise DataError(f"{printable(path)}: cannot be read as a film: {instead}")
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{printable(path)}: films are read by PyAV, which is not installed: pip install 'sat_lora[video]', or "
            "give a folder with its frames as pictures"
        ) from error
    try:
        with av.open(str(path), metadata_errors="ignore") as film:
            stream = film.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > max_pixels:
                raise DataError(f"{printable(path)}: its frames have more than --max-pixels {max_pixels} pixels")
            times = []
            for packet in film.demux(stream):
                if packet.pts is not None and packet.size:
                    times.append(float(packet.pts * packet.time_base))
        times.sort()  # packets come in the order of decoding
        wanted = chosen_frames([time - times[0] for time in times], version) if times else []
        if not wanted:
            raise DataError(f"{printable(path)}: cannot be read as a film: it has no frame")
        pictures: dict[int, Image.Image] = {}
        with av.open(str(path), metadata_errors="ignore") as film:
            for number, frame in enumerate(film.decode(video=0)):
                if number in wanted:
                    pictures[number] = frame.to_image()
                if number >= wanted[-1]:
                    break
    except DataError:
        raise
    except Exception as error:  # FFmpeg's errors are of many classes, and a damaged file raises what it leads to
        raise DataError(f"{printable(path)}: cannot be read as a film: {printable(error)}") from error
    last = max(pictures, default=None)
    if last is None:
        raise DataError(f"{printable(path)}: cannot be read as a film: no frame of it can be decoded")
    for number in wanted:  # a file that was cut short promises more frames than it has
        yield pictures.get(number, pictures[last])
