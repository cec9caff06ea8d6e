"""Seeded mutations of data files, and what a reader may do with them: read them, or refuse them with a DataError.

for number, content in mutated(seeds, times=300, seed=1):
    path.write_bytes(content)
    with within(folder, seconds=10):
        refused = refusal(read, path)
"""

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sat_lora.errors import DataError

PIECES = (
    *(b"\0", b"\r", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\x80" * 9, b"\xed\xa0\xbd"),
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"null", b"NaN", b"1e999", b"-", b"true", b"\\ud83d"),
    *(b"[" * 300, b'{"a":' * 300, b"[" * 100_000, b"9" * 5000, b"a" * 70_000, b"../x.png", b"~/x.png"),
    *(b"</s>", b"<EOI>", b"<eos>", b"<unk>", b"\\\\a.png", b"C:\\\\a.png", b"http://a/b.png", b"file:///x"),
    *(b"\x1b[2J", b"%2e%2e/", b"\\u0000", b"\xe2\x80\xa8", b"/x.png"),
)
VALUES = (None, True, 0, -1.5, 1e400, "", " ", "x", "</s>", "\ud83d", "../x.png", [], ["a.png"], {}, {"a": 1}, [[]])


def mutated(seeds: Sequence[bytes], *, times: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(number, content): `times` mutations of the seeds; number k is the same however many there are."""
    for number in range(times):
        generator = random.Random(f"{seed} {number}")
        content = generator.choice(seeds)
        for _ in range(generator.choice((1, 1, 2, 4))):
            content = generator.choice(MUTATIONS)(content, generator, seeds)
        yield number, content


def _place(content: bytes, generator: random.Random) -> int:
    return generator.randint(0, len(content))


def flip(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A few bits, anywhere."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 8) if changed else 0):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def cut(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """The beginning, or the end."""
    place = _place(content, generator)
    return content[:place] if generator.random() < 0.5 else content[place:]


def remove(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    place = _place(content, generator)
    return content[:place] + content[place + generator.choice((1, 2, 7, 40)) :]


def insert(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Something that readers are known to stumble over."""
    place = _place(content, generator)
    return content[:place] + generator.choice(PIECES) + content[place:]


def repeat(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    first, last = sorted((_place(content, generator), _place(content, generator)))
    return content[:last] + content[first:last] * generator.choice((1, 2, 5)) + content[last:]


def splice(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """The beginning of one and the end of another."""
    other = generator.choice(seeds)
    return content[: _place(content, generator)] + other[_place(other, generator) :]


def swap(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Of a JSON value somewhere in a line, or a key, another; of what is no JSON, bytes change places."""
    lines = content.split(b"\n")
    number = generator.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        first, last = sorted((_place(content, generator), _place(content, generator)))
        return content[last:] + content[first:last] + content[:first]
    lines[number] = json.dumps(_swapped(value, generator)).encode()
    return b"\n".join(lines)


def _swapped(value: object, generator: random.Random) -> object:
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice([*value])
        changed = {**value, key: _swapped(value[key], generator)}
        if generator.random() < 0.3:
            changed[generator.choice(("img", "question", "id", "_", "", "x" * 200, "\ud83d"))] = changed.pop(key)
        return changed
    if isinstance(value, list) and value and generator.random() < 0.9:
        place = generator.randrange(len(value))
        return [*value[:place], _swapped(value[place], generator), *value[place + 1 :]]
    return generator.choice((*VALUES, [value], {"a": value}))


def encode(content: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """As another system would have written it."""
    text = content.decode("utf-8", errors="replace")
    name = generator.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "gbk"))
    return text.replace("\n", generator.choice(("\n", "\r\n", "\r", "\u2028"))).encode(name, errors="replace")


MUTATIONS = (flip, cut, remove, insert, insert, repeat, splice, swap, swap, encode)


def refusal(read: Callable, *arguments) -> DataError | None:
    """The DataError that `read` ends with; any other exception is not caught."""
    try:
        read(*arguments)
    except DataError as error:
        str(error).encode("utf-8")  # it can be printed
        return error
    return None


_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


@contextlib.contextmanager
def within(*folders: Path, seconds: float) -> Iterator[None]:
    """AssertionError: a file outside of the folders is opened, Python's own aside; TimeoutError: it takes longer."""
    global _opened
    if _opened is None and not _hooked:
        sys.addaudithook(_note_opened)  # it stays as long as the process
        _hooked.append(True)
    _opened = []
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
        opened = _opened
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _opened = None
    allowed = [*map(os.path.abspath, folders), sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)]
    outside = [
        path
        for path in map(os.path.abspath, opened)
        if not path.endswith((".py", ".pyc")) and not any(path == a or path.startswith(a + os.sep) for a in allowed)
    ]
    assert not outside, outside


_hooked: list[bool] = []


def _too_long(number, frame):
    raise TimeoutError("a mutated file takes too long to read")
