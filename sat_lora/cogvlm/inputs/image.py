"""Images, and frames of films, to tensors, as CogVLM and its successors expect them."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch.nn import functional as F

from sat_lora.cogvlm.inputs.films import film_pictures
from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS, as_seen, read_picture

# CLIP's channel statistics.
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def image_tensor(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Return the image as (3, height, width) float32: `as_seen`, bicubic resize to `size`, normalised.

    The aspect ratio is not kept. The published code has `convert("RGB")` in place of `as_seen`: it drops transparency,
    orientation and profiles, and clips 16 bits. For a plain RGB or grey picture of 8 bits both are the same, bit for
    bit.
    """
    return _normalised(as_seen(image), size)


def load_image(
    source: str | Path | bytes, size: tuple[int, int], name: str | None = None, *, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Return what `image_tensor` gives of a file, or of a file's content.

    name: what the error calls it; None is the path. Raises DataError, as `read_picture` does, whatever keeps it from
    being read.
    """
    (image,) = load_sizes(source, [size], name, max_pixels=max_pixels)
    return image


def load_sizes(
    source: str | Path | bytes,
    sizes: Sequence[tuple[int, int]],
    name: str | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> list[torch.Tensor]:
    """Return what `load_image` gives for each of several sizes; the file is read once."""
    picture = read_picture(source, max_pixels=max_pixels, name=name)
    return [_normalised(picture, size) for size in sizes]


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


def no_images(size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """Return the images of a batch of text alone: (0, 3, height, width) in float32.

    The vision tower runs on them all the same, so that every rank takes the same steps whatever its samples are.
    """
    return torch.zeros(0, 3, *size, device=device)


def _normalised(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255.0).permute(2, 0, 1)
    return (pixels - MEAN) / STD
