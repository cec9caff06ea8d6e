"""Films of a few frames, each of one colour, in any container that PyAV writes."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy

STEP = 20
"""By how much each frame is lighter than the one before: more than an encoder changes a colour."""


def write_film(
    path: Path,
    frames: int = 10,
    rate: int | Fraction = 10,
    *,
    codec: str = "mpeg4",
    b_frames: int = 0,
    size: tuple[int, int] = (32, 32),
    corner_is_red: bool = False,
) -> Path:
    """Write a film whose frame n has grey STEP * n as far as that goes, size (width, height), and return its path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.max_b_frames = b_frames
        for number in range(frames):
            pixels = numpy.full((size[1], size[0], 3), min(255, STEP * number), numpy.uint8)
            if corner_is_red:
                pixels[: size[1] // 2, : size[0] // 2] = (255, 0, 0)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_sound(path: Path) -> Path:
    """Write a file that has sound and no picture, and return its path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.float32), "fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


def turn_film(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write into an MP4 how a viewer turns it, as phones do, and return its path. matrix: a, b, c, d of
    x' = a x + c y, y' = b x + d y.
    """
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 4 + 40
    a, b, c, d = (number << 16 for number in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path
