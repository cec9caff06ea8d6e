"""Images to tensors, as CogVLM expects them."""

from io import BytesIO
from pathlib import Path

import numpy
import torch
from PIL import Image, UnidentifiedImageError

from sat_lora.errors import DataError

# CLIP's channel statistics.
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def image_tensor(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """RGB, bicubic resize to `size` (height, width; the aspect ratio is not kept), normalised: (3, height, width)."""
    image = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255.0).permute(2, 0, 1)
    return (pixels - MEAN) / STD


def load_image(source: str | Path | bytes, size: tuple[int, int], name: str | None = None) -> torch.Tensor:
    """`image_tensor` of a file, or of a file's content; anything that keeps it from being read is a DataError.

    name: what the error calls it; None is the path.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image_tensor(image, size)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{name or source}: cannot be read as an image: {error}") from error
