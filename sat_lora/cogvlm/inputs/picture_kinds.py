"""Formats of picture files: which are read, and what a file that none of their decoders takes seems to be."""

from functools import lru_cache

from sat_lora.printable import printable

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

FILM_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpeg .mpg .ts .mts .m2ts .flv .wmv .3gp .ogv".split())
"""The suffixes of films, in lower case."""

UNREAD_SUFFIXES = frozenset(
    ".heic .heif .hif .svg .svgz .psd .psb .xcf .kra .ai .eps .ps .pdf .wmf .emf .djvu .jxl .jxr .exr .hdr .dcm .dng "
    ".cr2 .cr3 .nef .arw .raf .orf .rw2 .raw .fits .cur .icns .dds .xpm .xbm .mpeg .mp4 .mov .avi .webm .mkv".split()
)
"""The suffixes of pictures that nothing here reads, and of films, which no folder of pictures takes."""

CONVERT = "convert it to PNG or JPEG"
DAMAGED = "it is a damaged {} picture: write or copy it again"


@lru_cache
def built_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow was built with, in their order."""
    from PIL import Image  # this module is read before anything heavy is imported

    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


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
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file"), (8, b"WAVE", "a sound"), (0, b"ID3", "a sound"),
    (0, b"\x93NUMPY", "a NumPy array"),
)  # fmt: skip
"""The marks of what is not read."""

_FILMS = (
    (0, b"\x1aE\xdf\xa3", ".mkv"), (8, b"AVI ", ".avi"), (0, b"\0\0\1\xba", ".mpg"), (0, b"\0\0\1\xb3", ".mpg"),
    (0, b"FLV\1", ".flv"), (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ".wmv"), (0, b"OggS", ".ogv"),
    (4, b"moov", ".mov"), (4, b"mdat", ".mov"), (4, b"wide", ".mov"),
)  # fmt: skip
"""The marks of films, with a suffix of each kind. The last three are QuickTime's, which need not name a brand."""
_PACKETS = ((188, 0, ".ts"), (192, 4, ".m2ts"))
"""MPEG's transport streams, by (bytes of a packet, place of the byte that marks each one, suffix)."""

_BRANDS = {
    "AVIF": b"avif avis avio", "HEIC": b"heic heix heim heis hevc hevx hevm hevs", "raw": b"crx ",
    "film": b"isom iso2 iso4 iso5 iso6 mp41 mp42 avc1 dash qt   M4V  M4VP MSNV 3gp4 3gp5 3gp6 3g2a f4v  mmp4",
}  # fmt: skip
_HEIF = (b"mif1", b"mif2", b"msf1", b"miaf", b"heif")
"""Brands of ISO's container, which one begins with; HEIF is what AVIF and HEIC are both made of."""


def kind_by_mark(content: bytes) -> str | None:
    """Return the format of _MARKS, or AVIF, that a file begins as; None if it is none."""
    kind = next((name for place, mark, name in _MARKS if content.startswith(mark, place)), None)
    return kind or ("AVIF" if _brand(content) == "AVIF" else None)


def film_suffix(beginning: bytes) -> str | None:
    """Return a suffix of FILM_SUFFIXES that fits a file with these first 400 bytes or more; None if it is no film."""
    suffix = next((suffix for place, mark, suffix in _FILMS if beginning.startswith(mark, place)), None)
    if suffix is not None:
        return suffix
    if _brand(beginning) == "film":
        return ".mov" if beginning[8:12] == b"qt  " else ".mp4"
    for length, place, suffix in _PACKETS:
        if beginning[place : place + length + 1 : length] == b"GG":
            return suffix
    return None


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


def kind_of_content(content: bytes) -> str:
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
    if film_suffix(content) is not None:
        return f"a film; {CONVERT}"
    if (brand := _brand(content)) is not None:
        by_brand = {
            "AVIF": DAMAGED[len("it is ") :].format("AVIF"),
            "HEIC": f"a HEIC picture; {CONVERT}",
            "HEIF": f"a HEIC or AVIF picture; {CONVERT}, or, if it should be read, copy it again",
            "raw": f"a raw picture of a camera; {CONVERT}",
            "unknown": f"of no kind that is known of ISO's container (AVIF, HEIC, films); {CONVERT}",
        }
        if brand == "AVIF" and "AVIF" not in built_formats():
            return f"an AVIF picture, which this Pillow was built without; {CONVERT}"
        return by_brand[brand]
    if (kind := kind_by_mark(content)) is not None:
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
