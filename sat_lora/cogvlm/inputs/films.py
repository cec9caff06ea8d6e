"""Films to pictures: files that PyAV reads (extra `video`), animations, and folders with their frames.

version   frames of a file                                      between them in the text
base      24 at equal distances, of its first minute            nothing
others    the one nearest to each full second, the first 24     the frame's number, from 0 on

A folder has its pictures in the order of their names, numbers in them counted as such: all of up to 24, and of more
those that a film of one picture a second would have. A picture alone is a film of one frame.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from PIL import Image

from sat_lora.cogvlm.inputs.picture_kinds import FILM_SUFFIXES, film_suffix, kind_by_mark
from sat_lora.cogvlm.inputs.pictures import LONGEST, MAX_PIXELS, SUFFIXES, read_animation
from sat_lora.errors import DataError
from sat_lora.files.foreign import open_file, os_problem, stand_in
from sat_lora.printable import printable

MOST_FRAMES = 24
SECONDS = LONGEST  # of a film that version `base` looks at
TOUCHING = "base"
"""The version whose frames have nothing between them, and one position all together."""

Choose = Callable[[Sequence[float]], Sequence[int]]
"""Returns the numbers of the frames to look at, ascending, of the seconds at which all begin."""

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,m4v,h264,hevc"
"""FFmpeg's names of the containers that are opened: those that hold their frames. A playlist names other files."""
_MARGIN = 5.0  # seconds by which the order of decoding may differ from that of showing
_THERE = 0.9  # of the frames that the header tells of; some writers count those that they dropped
_BEGINNING = 400  # bytes by which a film is told from a picture
DAMAGED = "it is damaged or cut short; copy it again"


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


def count_frames(source: str | Path | bytes, version: str, *, max_pixels: int = MAX_PIXELS) -> int:
    """Return how many frames `film_pictures` gives of a film, for which at most one of its frames is decoded.

    source: as there; of what cannot be read, the most that a film may have.
    """
    counts: list[int] = []

    def first(times: Sequence[float]) -> list[int]:
        numbers = chosen_frames(times, version)
        counts.append(len(numbers))
        return numbers[:1]

    try:
        if isinstance(source, str | Path) and os.path.isdir(source):
            return len(set(chosen_frames([*map(float, range(len(_names_in(Path(source)))))], version)))
        pictures = _pictures(source, first, max_pixels, None)
    except DataError:
        return MOST_FRAMES
    return counts[0] if counts else len(pictures)


def film_pictures(
    source: str | Path | bytes, version: str, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> list[Image.Image]:
    """Return the frames of a film that a version looks at, in RGB as a viewer shows them: 1 to MOST_FRAMES.

    source: a film's or a picture's file, the content of one, or a folder of pictures. name: what an error calls it;
    None is the path. Raises DataError where it cannot be read, or has no frame.
    """
    return _pictures(source, partial(chosen_frames, version=version), max_pixels, name)


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


def middle_picture(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Return one frame from the middle of what is looked at of a film, to be shown to people; a picture as it is.

    Arguments and errors are those of `film_pictures`.
    """
    (picture,) = _pictures(source, _middle, max_pixels, name)
    return picture


def _middle(times: Sequence[float]) -> list[int]:
    numbers = chosen_frames(times, "chat")
    return numbers[len(numbers) // 2 :][:1]


def _pictures(source: str | Path | bytes, choose: Choose, max_pixels: int, name: str | None) -> list[Image.Image]:
    if isinstance(source, str | Path) and os.path.isdir(source):
        folder = Path(source)
        names = _names_in(folder)
        numbers = dict.fromkeys(choose([*map(float, range(len(names)))]))
        return [
            read_animation(folder / names[number], lambda times: [0], max_pixels=max_pixels)[0] for number in numbers
        ]
    shown = printable(name or (source if not isinstance(source, bytes) else "a film"))
    if not _is_film(source, shown):
        return read_animation(source, choose, max_pixels=max_pixels, name=name)
    return _frames_of_film(source, choose, max_pixels, f"{shown}: cannot be read as a film")


def _names_in(folder: Path) -> list[str]:
    """Return the names of a folder's pictures, in their order. Raises DataError where there is none."""
    try:
        names = [entry.name for entry in os.scandir(folder) if Path(entry.name).suffix.lower() in SUFFIXES]
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be read: {error.strerror}") from error
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise DataError(f"{printable(folder)}: no pictures in it; a folder has the frames of a film as pictures")
    return sorted(names, key=_with_numbers)


def _with_numbers(name: str) -> list[str | int]:
    """Return what names are sorted by: texts and numbers in turn."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def _is_film(source: str | Path | bytes, shown: str) -> bool:
    """Return whether a file is a film, by its content, and where that does not say, by its name.

    Raises DataError where something with the name of a film is no file to read.
    """
    if isinstance(source, bytes):
        return film_suffix(source[:_BEGINNING]) is not None
    has_suffix = Path(source).suffix.lower() in FILM_SUFFIXES
    if has_suffix:
        instead = stand_in(source) if os.path.exists(source) else "there is no such file"
        if instead is not None:
            raise DataError(f"{shown}: cannot be read as a film: {instead}")
    try:
        with open_file(source, sys.maxsize) as file:
            beginning = file.read(_BEGINNING)
    except (OSError, ValueError):  # which `read_animation` says
        return False
    return film_suffix(beginning) is not None or (has_suffix and kind_by_mark(beginning) is None)


def _frames_of_film(source: str | Path | bytes, choose: Choose, max_pixels: int, sentence: str) -> list[Image.Image]:
    """Return frames of a film. It is gone through twice: for the times, then for the pictures.

    PyAV gets an open file and no name, so that no film can make it read another file.
    """
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{sentence}: films are read by PyAV, which is not installed: pip install 'sat_lora[video]', or give a "
            "folder with its frames as pictures"
        ) from error
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source, sys.maxsize) as file:
            beginning = file.read(_BEGINNING)
            try:
                times = _times(av, file, max_pixels)
                if not times:
                    raise DataError("it has no frame")
                wanted = choose([time - times[0] for time in times])
                pictures = _decoded(av, file, {*wanted}, max_pixels)
            except (DataError, OSError):
                raise
            except Exception as error:  # FFmpeg's errors are of many classes, and damaged bytes raise what they lead to
                raise DataError(_no_film(beginning)) from error
    except DataError as error:
        raise DataError(f"{sentence}: {error}") from error
    except OSError as error:
        raise DataError(f"{sentence}: {printable(os_problem(error))}") from error
    if not pictures:
        raise DataError(f"{sentence}: no frame of it can be decoded; {DAMAGED}")
    last = max(pictures)
    return [pictures.get(number, pictures[last]) for number in wanted]  # the last packets of some hold no frame


def _opened(av: Any, file: BinaryIO) -> Any:
    file.seek(0)
    return av.open(file, metadata_errors="ignore", container_options={"format_whitelist": _CONTAINERS})


def _stream_of(film: Any, max_pixels: int) -> Any:
    """Return the stream of pictures. Raises DataError where there is none to decode, or its frames are too large."""
    stream = next(iter(film.streams.video), None)
    if stream is None:
        raise DataError("it has no picture stream, only sound; give a film" if film.streams.audio else DAMAGED)
    codec = stream.codec_context
    if codec is None:
        raise DataError("FFmpeg knows no decoder for it; convert it to H.264 in MP4")
    if codec.width * codec.height > max_pixels:
        raise DataError(f"its frames have more than --max-pixels {max_pixels} pixels")
    return stream


def _times(av: Any, file: BinaryIO, max_pixels: int) -> list[float]:
    """Return the seconds of the frames that may be looked at, ascending.

    Raises DataError where there are fewer than the header tells of. Streams (MPEG, Matroska, FLV) tell of none: of one
    that was cut short there is what is there.
    """
    times: list[float] = []
    packets = 0
    with _opened(av, file) as film:
        stream = _stream_of(film, max_pixels)
        is_whole = True
        for packet in film.demux(stream):
            packets += packet.dts is not None or packet.size > 0
            time = packet.dts if packet.pts is None else packet.pts
            if time is None or not packet.size:
                continue
            times.append(float(time * packet.time_base))
            if times[-1] - times[0] > SECONDS + _MARGIN:
                is_whole = False
                break
        promised = stream.frames
        if is_whole and packets < _THERE * promised:
            raise DataError(f"it says that it has {promised:,} frames, and {packets:,} are there; {DAMAGED}")
    return sorted(times)  # packets come in the order of decoding


def _decoded(av: Any, file: BinaryIO, wanted: set[int], max_pixels: int) -> dict[int, Image.Image]:
    """Return the frames of these numbers, by their number; and the last, where there are not so many."""
    pictures: dict[int, Image.Image] = {}
    with _opened(av, file) as film:
        _stream_of(film, max_pixels)
        number = -1
        frame = None
        for number, frame in enumerate(film.decode(video=0)):
            if frame.width * frame.height > max_pixels:  # a film may change its size
                raise DataError(f"its frames have more than --max-pixels {max_pixels} pixels")
            if number in wanted:
                pictures[number] = _turned(frame)
            if number >= max(wanted):
                break
        if frame is not None and number not in pictures:
            pictures[number] = _turned(frame)
    return pictures


def _turned(frame: Any) -> Image.Image:
    """Return a frame as a viewer shows it: phones film lying down and write beside it how to turn the pictures."""
    picture = frame.to_image()
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return picture
    right_x, right_y, _, down_x, down_y = numpy.frombuffer(matrix, dtype=numpy.int32)[:5].tolist()
    if abs(right_y) + abs(down_x) > abs(right_x) + abs(down_y):  # columns become rows
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
        is_mirrored = down_x < 0
        is_upside_down = right_y < 0
    else:
        is_mirrored = right_x < 0
        is_upside_down = down_y < 0
    if is_mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if is_upside_down:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture


def _no_film(beginning: bytes) -> str:
    """Return what a file that FFmpeg does not read is, by its first bytes, and what to do."""
    if film_suffix(beginning) is not None:
        return DAMAGED
    if beginning and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in beginning):
        begin = printable(beginning.decode().strip().split("\n")[0][:60])
        return f"it is text that begins {begin!r}; give the film itself: nothing else is opened for it"
    return "it is damaged, or no film of a kind that is read; copy it again, or convert it to MP4"
