"""What others wrote, read within limits and shown without harm: files of any kind under any name, and their names."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

MEBIBYTE = 1 << 20
JSON_LIMIT = 16 * MEBIBYTE  # of a configuration; the largest that is known, an index of 17 B weights, has 0.2 MB
DEPTH_LIMIT = 100


def printable(name: object) -> str:
    """`name` as text of one line that a terminal only shows: control and format characters, line separators and lone
    surrogates (bytes that are no UTF-8 among them) as Python would escape them.
    """
    text = str(name)
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def printable_lines(text: object) -> str:
    """`text` as `printable` gives it, its line feeds kept: for a message at the edge, whose lines are our own."""
    return "\n".join(map(printable, str(text).split("\n")))


def open_file(path: str | Path, limit: int) -> BinaryIO:
    """A regular file of at most `limit` bytes, opened for reading; what reads it stays within what it was opened with.

    OSError if it is anything else (a pipe or a device is never waited for, nor opened), or cannot be read; ValueError
    if it is larger.
    """
    _check_regular(os.stat(path))  # to open a device may do something
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        status = os.fstat(file.fileno())
        _check_regular(status)
        if status.st_size > limit:
            raise ValueError(f"larger than {limit / MEBIBYTE:g} MiB")
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{kind_of(status.st_mode)}, no file")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes, with the errors of `open_file`."""
    with open_file(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it grew, or is one of those of /proc, which tell no size
        raise ValueError(f"larger than {limit / MEBIBYTE:g} MiB")
    return content


def kind_of(mode: int) -> str:
    """What a mode of `os.stat` is of, in words."""
    kinds = {
        stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISLNK: "a link",
    }  # fmt: skip
    return next((words for is_kind, words in kinds.items() if is_kind(mode)), "something else")


def parse_json(text: str | bytes, *, parse_constant: Callable[[str], object] | None = None):
    """What `text` says as JSON; ValueError if it is none (bytes have to be UTF-8, a byte-order mark is passed over), or
    is nested deeper than DEPTH_LIMIT.

    parse_constant: as `json.loads` takes it, for NaN and the infinities, which are no JSON.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        content = json.loads(text.removeprefix("\ufeff"), parse_constant=parse_constant)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH_LIMIT}") from None
    layer = [content]
    for _ in range(DEPTH_LIMIT):
        layer = [value for held in layer for value in _held_by(held)]
        if not layer:
            return content
    raise ValueError(f"nested deeper than {DEPTH_LIMIT}")


def _held_by(value) -> list:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in held if isinstance(one, (dict, list))]


def read_json(path: str | Path, *, limit: int = JSON_LIMIT, parse_constant=None):
    """What the JSON file at `path` says, by `read_bytes` and `parse_json`, and with their OSError and ValueError."""
    return parse_json(read_bytes(path, limit), parse_constant=parse_constant)
