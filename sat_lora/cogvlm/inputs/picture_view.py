"""Pictures as people see them in an image viewer: turned, in sRGB of 8 bits, before a ground that shows them."""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy
from PIL import Image

from sat_lora.files.foreign import MEBIBYTE

_BAND = 1 << 22  # pixels that are converted at once
_PROFILE_LIMIT = 4 * MEBIBYTE
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def as_seen(image: Image.Image, *, grey_step: int = 1) -> Image.Image:
    """Return the picture that people see, as an RGB image.

    It is turned as its EXIF data says, 16 and 32 bits are brought to 8, colours of another profile to sRGB, and what is
    transparent is white. Of an animation it is the first frame. A plain RGB, grey or palette picture gives what
    Pillow's `convert("RGB")` gives.

    On a white ground white letters are lost: where everything that can be seen is white, the ground is black.
    grey_step: the values that lie between two grey levels of a picture of fewer than 8 bits, see `grey_step_of`.
    """
    colours = _colour_change(image)
    levels = _levels(image)
    picture, has_ground = _on_ground(image, 255, colours, levels, grey_step)
    if has_ground and min(low for low, _ in picture.getextrema()) >= 250:
        picture, _ = _on_ground(image, 0, colours, levels, grey_step)
    turn = _TURNS.get(_orientation(image))
    return picture if turn is None else picture.transpose(turn)


def _on_ground(image, ground: int, colours, levels, grey_step: int) -> tuple[Image.Image, bool]:
    """Return (the picture in RGB before a grey ground, whether that shows anywhere and does not show everywhere).

    It is made band by band, so that a large picture is in memory twice and not five times.
    """
    width, height = image.size
    rows = max(1, _BAND // max(1, width))
    picture = Image.new("RGB", image.size) if rows < height else None
    lightest = 0
    darkest = 255
    for top in range(0, height, rows):
        band = image if picture is None else image.crop((0, top, width, min(height, top + rows)))
        colour, alpha = _colour_and_alpha(band, levels, grey_step)
        colour = colours(colour) if colours else colour.convert("RGB")
        if alpha is not None:
            low, high = alpha.getextrema()
            darkest = min(darkest, low)
            lightest = max(lightest, high)
            colour = Image.composite(colour, Image.new("RGB", colour.size, (ground,) * 3), alpha)
        if picture is None:
            picture = colour
        else:
            picture.paste(colour, (0, top))
    return picture, darkest < 255 and lightest > 0


def _colour_and_alpha(image: Image.Image, levels, grey_step: int) -> tuple[Image.Image, Image.Image | None]:
    """Return (the colours without transparency, alpha: mode L, or None where nothing is transparent)."""
    transparent = image.info.get("transparency")
    if levels is not None:
        values = numpy.asarray(image)
        grey = Image.fromarray(_eight_bits(values, *levels))
        return grey, None if not isinstance(transparent, int) else _mask(values != transparent)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "PA" or (image.mode == "P" and transparent is not None):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        # 32 bits of these formats often have nothing in their last 8, and viewers know it.
        is_unused = image.format in ("TGA", "BMP", "DIB", "ICO") and alpha.getextrema() == (0, 0)
        return image.convert(image.mode[:-1]), None if is_unused else alpha
    if image.mode in ("1", "L") and isinstance(transparent, int):
        image = image.convert("L")
        return image, _mask(numpy.asarray(image) != transparent * grey_step)
    if image.mode == "RGB" and isinstance(transparent, tuple) and len(transparent) == 3:
        shift = 8 if max(transparent) > 255 else 0  # of 16 bits, of which Pillow keeps the upper half
        colour = [value >> shift for value in transparent]
        return image, _mask((numpy.asarray(image) != numpy.uint8(colour)).any(2))
    return image, None


def _mask(is_visible: numpy.ndarray) -> Image.Image:
    return Image.fromarray(is_visible.astype(numpy.uint8) * 255)


def grey_step_of(image: Image.Image) -> int:
    """Return what Pillow multiplies the values of a grey PNG with, but not the one that means transparent.

    It has to be asked before the picture is loaded.
    """
    raw_mode = image.tile[0][3] if image.format == "PNG" and image.tile else None
    steps: dict[str | None, int] = {"L;2": 85, "L;4": 17}
    return steps.get(raw_mode, 1)


def _levels(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white in a picture of more than 8 bits a grey value; None for any other.

    They are what the format says of 12 and 16 bits. 32 bits are used in many ways: the first of [0, 1] (floating point
    alone), [0, 255] and [0, 65535] that holds all values, else from the lowest to the highest.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    low: float
    high: float
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.format in ("PNG", "PPM") and image.mode == "I"):
        low = 0
        high = 4095 if tags.get(258) == (12,) else 65535
    else:
        low, high = _extrema(image)
        usual = [limit for limit in (1, 255, 65535) if limit > 1 or image.mode == "F"]
        low, high = next(((0, limit) for limit in usual if low >= 0 and high <= limit), (low, high))
    is_inverted = tags.get(262) == 0  # of TIFF; Pillow sees to it up to 8 bits
    return (high, low) if is_inverted else (low, high)


def _extrema(image: Image.Image) -> tuple[float, float]:
    rows = max(1, _BAND // max(1, image.width))
    low = numpy.inf
    high = -numpy.inf
    for top in range(0, image.height, rows):
        values = numpy.asarray(image.crop((0, top, image.width, min(image.height, top + rows))))
        values = values[numpy.isfinite(values)]
        if values.size:
            low = min(low, float(values.min()))
            high = max(high, float(values.max()))
    return (low, high) if low <= high else (0.0, 1.0)


def _eight_bits(values: numpy.ndarray, low: float, high: float) -> numpy.ndarray:
    with numpy.errstate(all="ignore"):
        scaled = (values.astype(numpy.float64) - low) * (255 / (high - low) if high != low else 0.0)
    return numpy.rint(numpy.nan_to_num(scaled, nan=0.0).clip(0, 255)).astype(numpy.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data; the picture is shown as it lies
        return 1


def _colour_change(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """Return what brings the picture's colours to sRGB; None if they are, or nobody knows what they are."""
    profile = image.info.get("icc_profile")
    mode = {"1": "L", "LA": "L", "La": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    if image.mode.startswith(("I", "F")) or image.mode == "L":
        mode = "L"
    change = None
    if mode == "LAB":
        change = _to_srgb(None, mode)
    elif isinstance(profile, bytes) and 0 < len(profile) <= _PROFILE_LIMIT:
        change = _to_srgb(profile, mode)
    elif image.format == "PNG" and not profile and "srgb" not in image.info and mode != "CMYK":
        change = _gamma_change(image.info.get("gamma"))
    if change is None:
        return None
    return lambda colour: change(colour if colour.mode == mode else colour.convert(mode))


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes | None, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Return what brings colours of an ICC profile (None: CIE L*a*b*) to sRGB.

    It is None where that changes no value by more than 2 of 255, and for a profile that is damaged, or is of another
    kind of colours than the picture has: viewers pass over those as well.
    """
    try:
        from PIL import ImageCms

        source = ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode in ("L", "RGB"):
            steps = numpy.arange(0, 256, 17 if mode == "L" else 51, dtype=numpy.uint8)
            colours = steps[:, None] if mode == "L" else numpy.stack(numpy.meshgrid(steps, steps, steps), -1)
            probe = Image.fromarray(colours.reshape(1, -1, 3) if mode == "RGB" else colours.reshape(1, -1))
            before, after = (
                numpy.asarray(colour, numpy.int16) for colour in (probe.convert("RGB"), transform.apply(probe))
            )
            if abs(after - before).max() <= 2:
                return None
    except Exception:  # of littlecms, where Pillow was built with it
        return None
    return transform.apply


def _gamma_change(gamma: object) -> Callable[[Image.Image], Image.Image] | None:
    """Return what brings colours to sRGB by the gAMA chunk of a PNG; None if it changes less than 5 %, as in libpng.

    gamma: the exponent of the encoding, 1 / 2.2 for sRGB.
    """
    if not isinstance(gamma, float) or not 0.05 < gamma < 20 or abs(gamma * 2.2 - 1) < 0.05:
        return None
    table = [round(255 * (value / 255) ** (1 / (gamma * 2.2))) for value in range(256)]
    return lambda colour: colour.point(table * len(colour.getbands())).convert("RGB")
