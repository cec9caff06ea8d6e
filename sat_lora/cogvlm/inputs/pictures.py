"""Picture files to RGB, as people see them in an image viewer."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy
from PIL import Image

from sat_lora.errors import DataError
from sat_lora.files.foreign import MEBIBYTE, open_file
from sat_lora.printable import printable

MAX_PIXELS = 89_478_485
"""Above it Pillow itself warns of a decompression bomb; a decoded picture of so many takes 0.4 GB."""

FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "ICO", "PCX"),
    *("SGI", "TGA"),
)
"""Pillow's decoders that are tried, by content: in-process ones alone. (EPS would start Ghostscript.) TGA has no mark
at its begin, so it comes last; JPEG opens MPO, of which the first picture is taken."""

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .pfm .jp2 .j2k .jpf .jpx "
    ".j2c .avif .qoi .ico .pcx .sgi .tga".split()
)
"""The suffixes of files that FORMATS can read, in lower case."""

UNREAD_SUFFIXES = frozenset(
    ".heic .heif .hif .svg .svgz .psd .psb .xcf .kra .ai .eps .ps .pdf .wmf .emf .djvu .jxl .jxr .exr .hdr .dcm .dng "
    ".cr2 .cr3 .nef .arw .raf .orf .rw2 .raw .fits .cur .icns .dds .xpm .xbm .mpeg .mp4 .mov .avi .webm .mkv".split()
)
"""The suffixes of pictures and films that nothing here reads."""

CONVERT = "convert it to PNG or JPEG"
DAMAGED = "it is a damaged {} picture: write or copy it again"
_BAND = 1 << 22  # pixels that are converted at once
_SCANS = 100  # the usual progressive JPEG has ten
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_PROFILE_LIMIT = 4 * MEBIBYTE
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def file_limit(max_pixels: int = MAX_PIXELS) -> int:
    """Return how many bytes a picture file may have: room for so many pixels of four unpacked channels of 16 bits."""
    return 8 * max_pixels + 16 * MEBIBYTE


def read_picture(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Return the picture in a file, or in a file's content, as an RGB image that `as_seen` gives.

    name: what an error calls it; None is the path. Only regular files of at most `file_limit(max_pixels)` bytes are
    opened, and nothing is decoded of a picture whose header tells of more than `max_pixels`.
    Raises DataError if it cannot be read, whatever the reason.
    """
    content = None
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source, file_limit(max_pixels)) as file:
            content = file.read(400)
            file.seek(0)
            with _limited_pillow(max_pixels), Image.open(file, formats=_built_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ValueError(
                        f"{width} x {height} pixels are more than --max-pixels {max_pixels}; make it smaller, or raise "
                        "the option"
                    )
                if image.format in ("JPEG", "MPO"):
                    _check_scans(file)
                grey_step = _grey_step(image)
                _check_end(file, image.format)
                image.load()
                return as_seen(image, grey_step=grey_step)
    # Pillow's decoders raise whatever damaged bytes lead them to, and one that is missed here stops a rank.
    except Exception as error:
        problem: Exception | str = error
        if isinstance(error, Image.UnidentifiedImageError):
            problem = f"it is {_kind_of_content(content or b'')}"
        elif isinstance(error, OSError) and error.strerror:
            problem = error.strerror  # without the path, which stands before
        elif not isinstance(error, (ValueError, MemoryError, Image.DecompressionBombError)):
            kind = _kind_by_mark(content or b"")
            problem = f"{error}; {DAMAGED.format(kind)}" if kind else error
        elif isinstance(error, MemoryError):
            problem = "there is not enough memory for it"
        shown = printable(name or (source if not isinstance(source, bytes) else "an image"))
        raise DataError(f"{shown}: cannot be read as an image: {printable(problem)}") from error


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
            kind = _kind_by_mark(filled[:400]) or kind
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


@lru_cache
def _built_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def suffix_of(content: bytes) -> str:
    """Return the suffix of SUFFIXES that fits the content of a picture file; .png where no decoder reads it."""
    try:
        with _limited_pillow(MAX_PIXELS), Image.open(io.BytesIO(content), formats=_built_formats()) as image:
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


_MARKS = (
    (0, b"\x89PNG", "PNG"), (0, b"\xff\xd8\xff", "JPEG"), (0, b"GIF8", "GIF"), (8, b"WEBP", "WebP"), (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"II+\0", "TIFF"), (4, b"jP  \r\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"), (0, b"qoif", "QOI"), (0, b"\0\0\1\0", "ICO"), (0, b"\x01\xda", "SGI"),
    (0, b"\x0a\x05\x01", "PCX"),
)  # fmt: skip
"""The marks (place, bytes, name) of formats that are read."""

_OTHERS = (
    (0, b"\xff\x0a", "a JPEG XL picture"), (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"8BPS", "a Photoshop file"), (0, b"gimp xcf", "a file of GIMP"), (0, b"DDS ", "a DDS texture"),
    (0, b"icns", "an icon of macOS"),
    (0, b"AT&TFORM", "a DjVu file"), (0, b"\xd7\xcd\xc6\x9a", "a WMF drawing"), (128, b"DICM", "a DICOM file"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR picture"), (0, b"#?RADIANCE", "a Radiance picture"),
    (0, b"SIMPLE  =", "a FITS file"), (0, b"FUJIFILMCCD-RAW", "a raw picture of a camera"),
    (0, b"IIU\0", "a raw picture of a camera"), (0, b"IIRO", "a raw picture of a camera"), (0, b"\0\0\2\0", "a cursor"),
    (0, b"/* XPM", "an XPM picture"), (0, b"%PDF", "a PDF file"), (0, b"%!PS", "a PostScript file"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file"), (0, b"\x1aE\xdf\xa3", "a film"), (8, b"AVI ", "a film"),
    (0, b"\0\0\1\xba", "a film"), (0, b"\0\0\1\xb3", "a film"), (0, b"FLV\1", "a film"), (8, b"WAVE", "a sound"),
    (0, b"ID3", "a sound"), (0, b"\x93NUMPY", "a NumPy array"),
)  # fmt: skip
"""The marks of what is not read."""

_BRANDS = {
    "AVIF": b"avif avis avio", "HEIC": b"heic heix heim heis hevc hevx hevm hevs", "raw": b"crx ",
    "film": b"isom iso2 iso4 iso5 iso6 mp41 mp42 avc1 dash qt   M4V  M4VP MSNV 3gp4 3gp5 3gp6 3g2a f4v  mmp4",
}  # fmt: skip
_HEIF = (b"mif1", b"mif2", b"msf1", b"miaf", b"heif")
"""Brands of ISO's container, which one begins with; HEIF is what AVIF and HEIC are both made of."""


def _kind_by_mark(content: bytes) -> str | None:
    """Return the format of _MARKS, or AVIF, that a file begins as; None if it is none."""
    kind = next((name for place, mark, name in _MARKS if content.startswith(mark, place)), None)
    return kind or ("AVIF" if _brand(content) == "AVIF" else None)


def _brand(content: bytes) -> str | None:
    """Return the name in _BRANDS of a file of ISO's container; HEIF where it does not say which of both it is.

    It is "unknown" for another brand, and None where there is no brand.
    """
    if content[4:8] != b"ftyp":
        return None
    end = min(len(content), max(16, int.from_bytes(content[:4], "big")))
    brands = [content[8:12], *(content[place : place + 4] for place in range(16, min(end, 96), 4))]
    for brand in brands:
        kind = next((name for name, listed in _BRANDS.items() if len(brand) == 4 and brand in listed), None)
        if kind is not None:
            return kind
    return "HEIF" if any(brand in _HEIF for brand in brands) else "unknown"


def _kind_of_content(content: bytes) -> str:
    """Return what a file that no decoder takes seems to be, by its first bytes, and what to do."""
    text = content.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not content:
        return "an empty file; write or copy it again"
    if content.strip(b"\0") == b"":
        return "all zeros; write or copy it again"
    for marks, kind_and_advice in (
        ((b"version https://git-lfs",), "a pointer of git lfs; fetch the file itself with `git lfs pull`"),
        ((b"<svg",), f"an SVG drawing; {CONVERT}"),
        ((b"<!doctype html", b"<html"), "a web page; fetch the picture itself"),
        ((b"pk\x03\x04", b"\x1f\x8b", b"rar!", b"7z\xbc\xaf"), "an archive; unpack it"),
        ((b"data:image/",), "a picture as text (a data URL); write its bytes to a file"),
        ((b"ivborw0kggo", b"/9j/", b"r0lgod", b"uklgr"), "a picture as text (base64); write its bytes to a file"),
    ):
        if text.startswith(marks):
            return kind_and_advice
    if b"<svg" in text:
        return f"an SVG drawing; {CONVERT}"
    unread = next((name for place, mark, name in _OTHERS if content.startswith(mark, place)), None)
    if unread is not None:
        return f"{unread}; {CONVERT}"
    if (brand := _brand(content)) is not None:
        by_brand = {
            "AVIF": DAMAGED[len("it is ") :].format("AVIF"),
            "HEIC": f"a HEIC picture; {CONVERT}",
            "HEIF": f"a HEIC or AVIF picture; {CONVERT}, or, if it should be read, copy it again",
            "film": f"a film; {CONVERT}",
            "raw": f"a raw picture of a camera; {CONVERT}",
            "unknown": f"of no kind that is known of ISO's container (AVIF, HEIC, films); {CONVERT}",
        }
        if brand == "AVIF" and "AVIF" not in _built_formats():
            return f"an AVIF picture, which this Pillow was built without; {CONVERT}"
        return by_brand[brand]
    if (kind := _kind_by_mark(content)) is not None:
        return DAMAGED[len("it is ") :].format(kind)
    if b"\xef\xbf\xbd" in content[:100]:
        return "a file that was written as text, which lost its bytes; copy it again as it is"
    if any(content.find(mark, 1, 12) > 0 for _, mark, _ in _MARKS if len(mark) > 2):
        return "a picture behind bytes that do not belong to it; copy it again"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in content):
        begin = printable(content.decode().strip().split("\n")[0][:60])
        kind_and_advice = (
            f"text that begins {begin!r}; fetch the picture itself" if begin else "white space; copy it again"
        )
        return f"of no format that is read, but {kind_and_advice}"
    return f"of no format that is read ({', '.join(FORMATS)}); {CONVERT}"


def as_seen(image: Image.Image, *, grey_step: int = 1) -> Image.Image:
    """Return the picture that people see, as an RGB image.

    It is turned as its EXIF data says, 16 and 32 bits are brought to 8, colours of another profile to sRGB, and what is
    transparent is white. Of an animation it is the first frame. A plain RGB, grey or palette picture gives what
    Pillow's `convert("RGB")` gives.

    On a white ground white letters are lost: where everything that can be seen is white, the ground is black.
    grey_step: the values that lie between two grey levels of a picture of fewer than 8 bits, see `_grey_step`.
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


def _grey_step(image: Image.Image) -> int:
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
