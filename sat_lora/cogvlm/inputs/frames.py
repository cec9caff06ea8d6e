"""The frames of a film as CogVLM2-Video takes them, and their places in the text; `films` says which those are."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch.nn import functional as F

from sat_lora.cogvlm.inputs.films import TOUCHING, film_pictures
from sat_lora.cogvlm.inputs.image import MEAN, STD
from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS, as_seen


def load_frames(
    source: str | Path | bytes,
    size: tuple[int, int],
    version: str,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> list[torch.Tensor]:
    """Return the frames of a film, each (3, height, width) float32: 1 to MOST_FRAMES of them.

    size: (height, width). The other arguments and the errors are those of `film_pictures`.
    """
    return [frame_tensor(picture, size) for picture in film_pictures(source, version, max_pixels=max_pixels, name=name)]


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
