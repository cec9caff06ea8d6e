"""Kind 4: a picture that is damaged is called so by its format, and what is none by what it is."""

import re

import pytest
from PIL import Image

from sat_lora.cogvlm.inputs.pictures import read_picture
from sat_lora.errors import DataError
from tests.support.picture_files import encoded

NOISE = Image.effect_noise((64, 48), 60).convert("RGB")
NAMES = {
    "PNG": "PNG",
    "JPEG": "JPEG",
    "WEBP": "WebP",
    "AVIF": "AVIF",
    "TIFF": "TIFF",
    "JPEG2000": "JPEG 2000",
    "GIF": "GIF",
}


def reason(content: bytes) -> str:
    with pytest.raises(DataError) as error:
        read_picture(content, name="x")
    return str(error.value).removeprefix("x: cannot be read as an image: ")


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("damage", ["half", "begin", "zeros", "header"])
def test_a_damaged_picture_is_called_so_by_its_format(kind, damage):
    content = encoded(NOISE, kind)
    content = {
        "half": content[: len(content) // 2],
        "begin": content[:24],
        "zeros": content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
        "header": content[:12] + bytes(48) + content[60:],
    }[damage]
    if (kind, damage) in (("TIFF", "zeros"), ("GIF", "header")):
        return  # pixels as they are, and colours of a palette: nothing tells that they are not meant
    words = reason(content)
    assert words.endswith(f"it is a damaged {NAMES[kind]} picture: write or copy it again") and "film" not in words


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF"])
def test_a_download_that_did_not_end_is_no_picture_though_it_could_be_drawn(kind):
    content = encoded(NOISE.resize((640, 480)), kind)
    kept = len(content) * 9 // 10
    zeros = len(content) - kept
    assert reason(content[:kept] + bytes(zeros)).startswith(
        f"its last {zeros:,} of {len(content):,} bytes are zeros; it"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_zeros_behind_a_whole_picture_are_none_of_it(kind):
    content = encoded(NOISE, kind)
    assert read_picture(content + bytes(4096)).tobytes() == read_picture(content).tobytes()


def container(brand: bytes, *more: bytes) -> bytes:
    return (16 + 4 * len(more)).to_bytes(4, "big") + b"ftyp" + brand + bytes(4) + b"".join(more) + bytes(40)


@pytest.mark.parametrize(
    "content, words",
    [
        (container(b"avif", b"mif1"), "a damaged AVIF picture"),
        (container(b"mif1", b"avif"), "a damaged AVIF picture"),
        (container(b"avis"), "a damaged AVIF picture"),
        (container(b"heic", b"mif1"), "a HEIC picture; convert"),
        (container(b"hevx"), "a HEIC picture; convert"),
        (container(b"mif1", b"heic"), "a HEIC picture; convert"),
        (container(b"mif1"), "a HEIC or AVIF picture"),
        (container(b"crx "), "a raw picture of a camera"),
        (container(b"isom", b"mp41"), "a film; convert"),
        (container(b"qt  "), "a film; convert"),
        (container(b"zzzz"), "of no kind that is known of ISO's container (AVIF, HEIC, films)"),
        (b"\x1aE\xdf\xa3....", "a film; convert"),
        (b"RIFF....AVI LIST", "a film; convert"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture; convert"),
        (b"\x76\x2f\x31\x01", "an OpenEXR picture; convert"),
        (bytes(128) + b"DICM", "a DICOM file; convert"),
        (b"\xef\xbb\xbf" + encoded(NOISE, "PNG"), "a picture behind bytes that do not belong to it"),
        (encoded(NOISE, "PNG").decode("utf-8", "replace").encode(), "a file that was written as text"),
        (encoded(NOISE, "PNG").replace(b"\r\n", b"\n"), "a damaged PNG picture"),
        (b"iVBORw0KGgoAAAANSUhEUg==", "a picture as text (base64)"),
        (b"data:image/png;base64,iVBOR", "a picture as text (a data URL)"),
        (b'{"error": "not found"}', 'of no format that is read, but text that begins \'{"error": "not found"}\''),
        (b"404: Not Found\n", "of no format that is read, but text that begins '404: Not Found'"),
        (b" \n\n", "of no format that is read, but white space"),
    ],
)
def test_what_is_no_picture_that_is_read_is_named(content, words):
    assert re.match(re.escape(f"it is {words}"), reason(content))
