"""Cleanly printed strings of digits, which the demo's base model learns to read before it ever sees a captcha."""

import random
from functools import cache
from pathlib import Path

import matplotlib
import numpy
import torch
from captcha.image import DEFAULT_FONTS
from PIL import Image, ImageDraw, ImageFont

from sat_lora.cogvlm.inputs.image import MEAN, STD

DIGITS = "0123456789"
PLACES = 3  # a string has up to this many digits, each in its own part of the width
PAPER = (0.92, 1.0)  # range of the paper's colour channels, before normalisation
INK = (0.0, 0.35)


@cache
def fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """Return fonts that come with the Python packages, so that the images are the same on every machine."""
    dejavu = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [DEFAULT_FONTS[0], dejavu / "DejaVuSans.ttf", dejavu / "DejaVuSansMono.ttf"]
    return [ImageFont.load_default(size)] + [ImageFont.truetype(str(file), size) for file in files]


def _draw_digit(digit: str, font: ImageFont.FreeTypeFont, rng: random.Random) -> Image.Image:
    """Return the grey mask of a digit, turned a little, 255 where the ink is."""
    left, top, right, bottom = font.getbbox(digit)
    glyph = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    place = (2 - left, 2 - top)
    ImageDraw.Draw(glyph).text(place, digit, font=font, fill=255, stroke_width=rng.choice((0, 0, 1)))
    return glyph.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, expand=True)


def draw_string(text: str, size: int, rng: random.Random) -> Image.Image:
    """Return the (size, size) grey mask of a string, 255 where the ink is.

    Digit k stands in the middle of the k-th third, give or take a few percent. That regularity matters: from digits
    placed at random the model does not find out within a few thousand steps where to look.
    """
    width = 2 * size  # drawn at twice the size and reduced, for smooth edges
    page = Image.new("L", (width, width), 0)
    font = rng.choice(fonts(4 * int(rng.uniform(0.36, 0.48) * width / 4)))
    shift = rng.uniform(-0.03, 0.03) * width
    middle = (0.5 + rng.uniform(-0.05, 0.05)) * width
    for place, digit in enumerate(text):
        glyph = _draw_digit(digit, font, rng)
        centre = width * (place + 0.5) / PLACES + shift + rng.uniform(-0.02, 0.02) * width
        height = middle + rng.uniform(-0.02, 0.02) * width
        page.paste(255, (max(0, int(centre - glyph.width / 2)), int(height - glyph.height / 2)), glyph)
    return page.resize((size, size), Image.Resampling.BOX)


def clean_strings(
    count: int, size: int, seed: int, lengths: tuple[int, ...] = (PLACES,)
) -> tuple[torch.Tensor, list[str]]:
    """Return masks (count, size, size) uint8 and their strings, each of a length drawn from `lengths`."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices(DIGITS, k=rng.choice(lengths))) for _ in range(count)]
    masks = numpy.stack([numpy.asarray(draw_string(text, size, rng)) for text in texts])
    return torch.from_numpy(masks), texts


def colour(masks: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return masks (batch, size, size) as dark ink on light paper, normalised as `image_tensor` does: float32
    (batch, 3, size, size).
    """

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(masks), 3, 1, 1, generator=generator)

    paper = draw(*PAPER)
    ink = draw(*INK)
    return (paper + masks[:, None] / 255 * (ink - paper) - MEAN) / STD
