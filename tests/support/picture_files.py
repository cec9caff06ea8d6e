"""Picture files for tests."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    """What Pillow writes in the format `kind`."""
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def chunked_png(rows: list[bytes], width: int, bits: int, colour_type: int, *, height: int = 0, **chunks) -> bytes:
    """A PNG of exactly these chunks, which Pillow itself would not write. height: if it is not that of `rows`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    sizes = struct.pack(">IIBBBBB", width, height or len(rows), bits, colour_type, 0, 0, 0)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + extra + data + chunk(b"IEND", b"")


def write_images(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (21, 21), (number * 20 % 256, 90, 200)).save(folder / name)
    return folder
