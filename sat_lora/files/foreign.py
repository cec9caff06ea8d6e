"""What others wrote, read within limits and shown without harm: files of any kind under any name, and their names."""

import errno
import json
import os
import stat
from collections.abc import Callable
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from sat_lora.printable import printable

Content = TypeVar("Content")
ParseConstant = Callable[[str], Any] | None
"""What `json` calls with NaN, Infinity and -Infinity, which are no JSON."""
PairsHook = Callable[[list[tuple[str, Any]]], Any] | None
"""What `json` calls with the names and values of each object, in their order."""

MEBIBYTE = 1 << 20
JSON_LIMIT = 16 * MEBIBYTE  # of a configuration; the largest that is known, an index of 17 B weights, has 0.2 MB
DEPTH_LIMIT = 100
TOO_DEEP = f"nested deeper than {DEPTH_LIMIT}"
LFS_POINTER = (
    "it is a pointer of git LFS and not the file itself; run `git lfs install` and `git lfs pull` in that folder, or "
    "download the file"
)


def name_problem(path: str | Path) -> str | None:
    """Return why weights that were written at `path` could not be read there again: safetensors takes UTF-8 alone."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        return "its name is no UTF-8, and no weights can be read under such a name"
    return None


def os_problem(error: OSError) -> str:
    """Return an OSError that names a file or a folder as one line: what could not be used, why, and what to do."""
    name = printable(os.fsdecode(error.filename))
    reason = error.strerror or type(error).__name__
    advice: dict[int | None, str] = {
        errno.EACCES: "; give the user who runs this the right to it (ls -ld shows who has it)",
        errno.EPERM: "; give the user who runs this the right to it (ls -ld shows who has it)",
        errno.ENOSPC: "; make room on that disk",
        errno.EDQUOT: "; make room within the quota",
        errno.EROFS: "; choose a folder on a disk that can be written",
    }
    return f"{name}: {reason}{advice.get(error.errno, '')}"


def open_file(path: str | Path, limit: int) -> BufferedReader:
    """Return a regular file of at most `limit` bytes, opened for reading; what reads it stays within that.

    Raises OSError if it is anything else (a pipe or a device is never waited for, nor opened), or cannot be read;
    ValueError if it is larger.
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
    """Return the content of a regular file of at most `limit` bytes. Raises the errors of `open_file`."""
    with open_file(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it grew, or is one of those of /proc, which tell no size
        raise ValueError(f"larger than {limit / MEBIBYTE:g} MiB")
    return content


def kind_of(mode: int) -> str:
    """Return what a mode of `os.stat` is the mode of, in words: "a file", "a pipe"."""
    kinds = {
        stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISLNK: "a link",
    }  # fmt: skip
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "something else")


def parse_json(text: str | bytes, *, parse_constant: ParseConstant = None, object_pairs_hook: PairsHook = None) -> Any:
    """Return what `text` says as JSON; a byte-order mark is passed over.

    parse_constant, object_pairs_hook: as `json.loads` takes them.
    Raises ValueError if it is none (bytes have to be UTF-8), or is nested deeper than DEPTH_LIMIT.
    """
    if isinstance(text, bytes):
        if is_lfs_pointer(text):
            raise ValueError(LFS_POINTER)
        text = text.decode("utf-8-sig")
    text = text.removeprefix("\ufeff")
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("a second byte-order mark", text, 0)
    try:
        content = _decoder(parse_constant, object_pairs_hook).decode(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return _checked_depth(content) if _may_be_deep(text) else content


def parse_json_at(text: str, start: int, *, object_pairs_hook: PairsHook = None) -> tuple[object, int]:
    """Return (the JSON value that begins at `start`, where it ends).

    object_pairs_hook: as `parse_json` takes it. Raises ValueError as that does.
    """
    content: object
    try:
        content, end = _decoder(None, object_pairs_hook).raw_decode(text, start)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return _checked_depth(content), end


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dictionary. Raises ValueError for a key that comes twice, of which the last would count."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} stands twice in one place; keep one of them")
        content[key] = value
    return content


@lru_cache(maxsize=16)
def _decoder(parse_constant: ParseConstant, object_pairs_hook: PairsHook) -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=parse_constant, object_pairs_hook=object_pairs_hook)


def _may_be_deep(text: str) -> bool:
    """Return whether a text has enough brackets to be nested deeper than DEPTH_LIMIT: most lines have not."""
    return text.count("{") + text.count("[") > DEPTH_LIMIT


def _checked_depth(content: Content) -> Content:
    layer: list[object] = [content]
    for _ in range(DEPTH_LIMIT):
        layer = [value for container in layer for value in _containers_in(container)]
        if not layer:
            return content
    raise ValueError(TOO_DEEP)


def _containers_in(value: object) -> list[object]:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [entry for entry in entries if isinstance(entry, (dict, list))]


def read_json(path: str | Path, *, limit: int = JSON_LIMIT, parse_constant: ParseConstant = None) -> Any:
    """Return what the JSON file at `path` says. Raises OSError and ValueError as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, limit), parse_constant=parse_constant)


BEGINNING = 1024  # of a file; pointers of git LFS and pages of errors are told by it
_UNFINISHED = (".aria2", ".part", ".incomplete", ".crdownload", ".download")
_ANSWERS = (
    "entry not found", "not found", "repository not found", "invalid username or password", "access denied",
    "forbidden", "unauthorized", "access to model", "<?xml",
)  # fmt: skip
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}


def is_lfs_pointer(content: bytes) -> bool:
    """Return whether `content` is what git leaves in a file's place where git LFS did not bring it."""
    head = content[:200].lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith((b"version https://git-lfs", b"version https://hawser"))


def stand_in(path: str | Path, *, archive: bool = False) -> str | None:
    """Return what lies at `path` in place of the file that belongs there, and what to do, as a clause.

    It is None if all seems well. Known are pointers of git LFS, answers of a server that were saved under the file's
    name, downloads that did not end, and what is no regular file. archive: whether the file may be a zip archive, as
    torch's are.
    """
    path = Path(path)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                return f"it is {kind_of(mode)}, no file"
            head = file.read(BEGINNING)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    beside = next((suffix for suffix in _UNFINISHED if path.with_name(path.name + suffix).exists()), None)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if is_lfs_pointer(head):
        return LFS_POINTER
    if beside is not None:
        return f"{printable(path.name + beside)} lies beside it, so its download did not end; download it to its end"
    if not head:
        return "it is empty; if its download was cut short, download it again"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "it is a web page and not the file: a server answered with an error or a login; download it again"
    if len(head) < BEGINNING and text.startswith(tuple(answer.encode() for answer in _ANSWERS)):
        answer = printable(head.decode("utf-8", "replace").strip().splitlines()[0][:80])
        return f"it holds a server's answer, {answer!r}, and not the file; download it again"
    if not head.strip(b"\0"):
        return "it begins with zeros, as a download that did not end does; download it again"
    kind = next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)
    if kind is not None and not (archive and head.startswith(b"PK")):
        return f"it is {kind}; unpack it, or give the file that belongs there"
    return None
