"""What a sample names as its image: a path, the bytes of a file, or those bytes as base64 or in a data URL."""

import base64
import binascii
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote_to_bytes

from sat_lora.data.records.record import RecordError

NAME_LIMIT = 255  # bytes, as file systems have them
PATH_LIMIT = 4000  # characters
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|\\\\")
DATA_URL = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
# PNG, JPEG, GIF, WebP, BMP and TIFF as base64 begins them.
_BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}=*\s*")


@runtime_checkable
class StoredImage(Protocol):
    """An image that lies in a table or the like, and is read when its turn comes."""

    def read(self) -> bytes:
        """Return the content of the image's file. Raises OSError or ValueError if it cannot be read."""


def image_source(value: object, folder: Path, roots: Sequence[str], key: str = "image") -> Path | bytes | StoredImage:
    """Return the path of an image, or the content of its file; only a path with a backslash is looked for here.

    value: a text, bytes, or a mapping with `bytes`, `path` or `url`, as Hugging Face's data sets and OpenAI's messages
    have them. folder: what paths are relative to. roots: folders that `..` may lead to. key: what messages call it.
    Raises RecordError.
    """
    if isinstance(value, str):
        return _text_source(value, folder, roots, key)
    if isinstance(value, dict):
        name = next((name for name in ("bytes", "url", "path", "image", "data") if value.get(name) is not None), None)
        if name is None:
            raise RecordError(f'"{key}" has neither "bytes" nor "path" nor "url"')
        content = value[name]
        if name in ("bytes", "data") and isinstance(content, str):
            return _decoded(content, key)
        if isinstance(content, dict):
            raise RecordError(f'"{key}" is an object of objects; wanted a path, bytes or a data URL')
        return image_source(content, folder, roots, key)
    if isinstance(value, bytes):
        if not value:
            raise RecordError(f'"{key}" holds no bytes')
        return value
    if isinstance(value, StoredImage):
        return value
    raise RecordError(f'"{key}" is none of a path, bytes and a data URL')


def _text_source(value: str, folder: Path, roots: Sequence[str], key: str) -> Path | bytes:
    """Return the path that a text is, or the bytes that it holds. Raises RecordError."""
    if match := DATA_URL.match(value):
        content = value[match.end() :]
        return _decoded(content, key) if ";base64" in match[0].lower() else unquote_to_bytes(content)
    if _BASE64.fullmatch(value) and not os.path.lexists(folder / value[:PATH_LIMIT].split("\n")[0][:NAME_LIMIT]):
        return _decoded(value, key)
    return _path(value, folder, roots, key)


def _decoded(text: str, key: str) -> bytes:
    try:
        content = base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f'"{key}" holds base64 that cannot be decoded: {error}') from None
    if not content:
        raise RecordError(f'"{key}" holds no bytes')
    return content


def _path(image: str, folder: Path, roots: Sequence[str], key: str) -> Path:
    named = f'"{key}"'
    if not image.strip():
        raise RecordError(f"{named} is empty; leave it out, or give null, for a sample of text alone")
    if "\0" in image:
        raise RecordError(f"{named} holds a NUL, which no file name can")
    if len(image) > NAME_LIMIT // 4 and not _could_be_a_path(image):
        raise RecordError(f"{named} is no path, {len(image)} characters: {image[:40]}...")
    if image.startswith("file://"):
        raise RecordError(f"{named} is an address, {image[:80]}: give the path alone")
    if ":" in image and ADDRESS.match(image):
        raise RecordError(f"{named} is an address, {image[:80]}: nothing is fetched; load it down and give its path")
    if image == "~" or image.startswith("~/"):
        raise RecordError(f"{named} is {image[:80]}: ~ is the shell's; write the path out")
    if WINDOWS_ROOT.match(image) and not os.path.lexists(folder / image):
        raise RecordError(f"{named} is a path of Windows, {image[:80]}: give one of this machine")
    if "\\" in image and not os.path.lexists(folder / image):
        image = image.replace("\\", "/")
    path = folder / image
    if ".." in image and ".." in Path(image).parts and not os.path.isabs(image):
        target = os.path.abspath(path)
        if not any(os.path.commonpath([root, target]) == root for root in roots):
            where = os.path.dirname(target)
            raise RecordError(f"{named} leaves the folder of the file: {image[:80]}; --images-from {where} allows it")
    return path


def _could_be_a_path(image: str) -> bool:
    longest = max(len(part.encode(errors="replace")) for part in image.split("/"))
    return longest <= NAME_LIMIT and len(image) <= PATH_LIMIT
