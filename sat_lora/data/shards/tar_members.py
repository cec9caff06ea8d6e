"""The members of a tar file, header by header; nothing is unpacked, and nothing in it can make reading long.

Python's tarfile goes round for ever on a member of negative size (CVE-2025-8194), reads extended headers of any size
whole, and raises whatever a wrong number leads it to. This reads ustar, GNU and pax headers and goes forward only.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sat_lora.files.foreign import LFS_POINTER, MEBIBYTE, is_lfs_pointer

BLOCK = 512
EXTENDED_LIMIT = MEBIBYTE  # of a header that holds a long name or pax records
LINKS_FOLLOWED = 8
_END = bytes(BLOCK)
_COMPRESSED = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd", b"PK": "unzip",
}  # fmt: skip
_WITHOUT_DATA = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe"}
_RECORDS = re.compile(rb"(\d{1,20}) ([^=]{1,200})=")


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar file: `size` bytes from `first` on.

    kind: "a file", "a link", "a folder", or what else has no data to read. target: of a link, as `Links.find` takes it.
    """

    name: str
    kind: str
    first: int
    size: int
    target: str | None = None


def unpacking_program(file: BinaryIO) -> str | None:
    """Return the program that unpacks an open file; None if it is not compressed."""
    begin = _read_at(file, 0, 6)
    return next((program for magic, program in _COMPRESSED.items() if begin.startswith(magic)), None)


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of an open tar file, in their order, to the block of zeros that ends it.

    Raises ValueError if it is no tar file, is damaged or cut off: when the members before have been given.
    """
    total = os.fstat(file.fileno()).st_size
    offset = 0
    common: dict[bytes, bytes] = {}
    of_next: dict[bytes, bytes] = {}
    while True:
        header = _read_at(file, offset, BLOCK)
        if offset == 0 and is_lfs_pointer(header):
            raise ValueError(LFS_POINTER)
        if len(header) < BLOCK:
            raise ValueError(f"damaged or cut off at byte {offset}")
        if header == _END:
            return
        _check(header, offset)
        kind = header[156:157]
        size = _number(header[124:136], offset)
        first = offset + BLOCK
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            if size > EXTENDED_LIMIT:
                raise ValueError(f"damaged at byte {offset}: a header of {size} bytes")
            content = _read_at(file, first, size)
            if len(content) < size:
                raise ValueError(f"cut off at byte {first}")
            if kind == b"g":
                common |= _pax_records(content, offset)
            elif kind in (b"x", b"X"):
                of_next |= _pax_records(content, offset)
            else:
                of_next[b"path" if kind == b"L" else b"linkpath"] = content.split(b"\0", 1)[0]
            offset = first + _padded(size)
            continue
        fields = common | of_next
        of_next = {}
        if b"size" in fields:
            size = _decimal(fields[b"size"], offset)
        name = _name(header, fields)
        member_kind = _WITHOUT_DATA.get(kind, "a file")
        if kind in (b"\0", b"0") and name.endswith("/"):
            member_kind = "a folder"
        if kind == b"S":
            first = _after_sparse_map(file, header, first, total)
            member_kind = "a sparse file"
        elif any(key.startswith(b"GNU.sparse.") for key in fields):
            member_kind = "a sparse file"
        if kind in _WITHOUT_DATA:
            size = 0
        if first + size > total:
            raise ValueError(f"the file ends {first + size - total} bytes too early, in the member at byte {offset}")
        target = _target(kind, name, fields.get(b"linkpath", _text(header[157:257])))
        yield Member(name, member_kind, first, size, target)
        offset = first + _padded(size)


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _check(header: bytes, offset: int) -> None:
    """Raise ValueError unless the sum in the header is that of its bytes, with spaces where it stands itself.

    The bytes may be taken as signed or unsigned.
    """
    summed = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(summed)
    try:
        expected = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        expected = None
    if expected != unsigned and expected != unsigned - 256 * sum(byte > 127 for byte in summed):
        raise ValueError("it is no tar file" if offset == 0 else f"damaged at byte {offset}")


def _number(field: bytes, offset: int) -> int:
    """Return the number of a field: octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
    else:
        try:
            value = int(_text(field).strip() or b"0", 8)
        except ValueError:
            raise ValueError(f"damaged at byte {offset}: a size of {field!r}") from None
    if not 0 <= value < 1 << 62:
        raise ValueError(f"damaged at byte {offset}: a size of {value} bytes")
    return value


def _decimal(digits: bytes, offset: int) -> int:
    if not re.fullmatch(rb"\d{1,18}", digits):
        raise ValueError(f"damaged at byte {offset}: a size of {digits[:40]!r}")
    return int(digits)


def _pax_records(content: bytes, offset: int) -> dict[bytes, bytes]:
    r"""Return those of the records `LENGTH KEY=VALUE\n` that matter here, by key."""
    fields = {}
    place = 0
    while place < len(content) and content[place]:
        match = _RECORDS.match(content, place)
        length = int(match[1]) if match else 0
        if match is None or place + length > len(content) or match.end() >= place + length:
            raise ValueError(f"damaged at byte {offset}: its pax records")
        key = match[2]
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            fields[key[:60]] = content[match.end() : place + length - 1]
        place += length
    return fields


def _name(header: bytes, fields: dict[bytes, bytes]) -> str:
    name = fields.get(b"GNU.sparse.name") or fields.get(b"path")
    if name is None:
        name = _text(header[:100])
        # GNU's own layout has other things where POSIX has the begin of a long name.
        prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else b""
        name = prefix + b"/" + name if prefix else name
    return _text(name).decode("utf-8", "surrogateescape")


def _target(kind: bytes, name: str, target: bytes) -> str | None:
    """Return where in the archive a link leads; None for another member.

    A hard link leads from the archive's root, a symbolic one from its own folder.
    """
    if kind not in (b"1", b"2"):
        return None
    path = target.decode("utf-8", "surrogateescape")
    return normal_name(path if kind == b"1" else posixpath.join(posixpath.dirname(name), path))


def normal_name(name: str) -> str:
    """Return a member's path without `.` and `..` where they lead nowhere: what links are looked up by."""
    return posixpath.normpath(name)


def _after_sparse_map(file: BinaryIO, header: bytes, first: int, total: int) -> int:
    is_extended = header[482]
    while is_extended and first < total:
        block = _read_at(file, first, BLOCK)
        is_extended = block[504] if len(block) == BLOCK else 0
        first += BLOCK
    return first


class Links:
    """Where the links of a tar file lead; its members are looked up when the first one asks."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._members: dict[str, Member] | None = None

    def find(self, link: Member) -> Member | None:
        """Return the file that a link leads to in the end, in the same archive; None if there is none."""
        if self._members is None:
            self._members = {}
            try:
                for other in read_members(self._file):
                    # A hard link has its target before it; the same name again replaces the first, as unpacking does.
                    if other.target != normal_name(other.name):
                        self._members[normal_name(other.name)] = other
            except ValueError:
                pass  # what comes before the damage; whoever reads on from the link meets it
        member = link
        for _ in range(LINKS_FOLLOWED):
            target = None if member.target is None else self._members.get(member.target)
            if target is None:
                return None
            member = target
            if member.kind != "a link":
                break
        return member if member.kind == "a file" else None
