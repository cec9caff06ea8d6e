"""Files of samples as people, editors and systems write them: one JSON object per line, or an array of such objects.

Lines end in \\n, \\r\\n or \\r, and nothing else ends one. UTF-8, with or without a byte-order mark, UTF-16 and UTF-32.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path

from sat_lora.data.item_keys import METADATA, READ, WANTED, key_problems
from sat_lora.data.json_texts import Place, elements, json_problem, short_problem, unique_keys
from sat_lora.errors import DataError
from sat_lora.files.foreign import open_file, parse_json
from sat_lora.printable import printable

FILE_LIMIT = 1 << 40  # bytes: a file is read line by line
LINE_LIMIT = 1 << 27  # characters of a line, which is in memory as a whole
WHOLE_LIMIT = 1 << 28  # the same of an array
SHOWN = 10  # problems of a file
NAME_LIMIT = 255  # bytes, as file systems have them
PATH_LIMIT = 4000  # characters
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@dataclass(frozen=True)
class Entry:
    """One object of a file. line: its number; of an object in an array, `object 3 (line 7)`."""

    image: Path | None
    prompt: str | None
    answer: str
    line: int | str


@dataclass
class Entries:
    """The objects that a file holds. passed_over: how many of them have a key that is not read, by its name."""

    objects: list[Entry] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


@dataclass
class _Problems:
    """Problems as texts, each with the lines that have it, in the order in which they came up."""

    lines: dict[str, list[int | str]] = field(default_factory=dict)

    def add(self, number: int | str, text: str) -> None:
        self.lines.setdefault(printable(text), []).append(number)

    def raise_any(self, path: Path) -> None:
        """Raise DataError with all problems, in the name of the file, if there are any."""
        if not self.lines:
            return
        count = len({number for numbers in self.lines.values() for number in numbers})
        shown = [_described(text, numbers) for text, numbers in [*self.lines.items()][:SHOWN]]
        shown += ["..."] * (len(self.lines) > SHOWN)
        lines = "1 line" if count == 1 else f"{count} lines"
        if any(isinstance(number, str) for numbers in self.lines.values() for number in numbers):
            lines = "1 object" if count == 1 else f"{count} objects"
        raise DataError("\n  ".join([f"{printable(path)}: {lines} cannot be used:", *shown]))


def _described(text: str, numbers: list[int | str]) -> str:
    first, *others = numbers
    sentence = f"{line_called(first)}{text}"
    if others:
        listed = ", ".join(map(str, others[:5])) + (", ..." if len(others) > 5 else "")
        sentence += f"; the same in {len(others)} more: {listed}"
    return sentence


def line_called(line: int | str) -> str:
    """Return what messages call an Entry's line."""
    return line if isinstance(line, str) else f"line {line}"


def read_entries(path: str | Path, *, ignored: Collection[str] = (), images_from: Sequence[str | Path] = ()) -> Entries:
    """Return the objects of a file, whatever its name; none if it holds nothing but white space.

    ignored: keys to pass over. images_from: folders, beside the file's own, that a relative path may lead to by `..`.
    Raises DataError if it is no regular file or cannot be read, or with every wrong line of it.
    """
    path = Path(path)
    entries = Entries()
    problems = _Problems()
    roots = [os.path.abspath(folder) for folder in (path.parent, *images_from)]
    try:
        for number, value in _values(path, problems):
            texts = object_problems(value, ignored)
            image = value.get("image") if isinstance(value, dict) else None
            if not texts and image is not None:
                image, problem = _image_path(path.parent, image, roots)
                texts = [problem] if problem else []
            if texts or not isinstance(value, dict):
                problems.add(number, ": " + "; ".join(texts))
                continue
            entries.objects.append(Entry(image, value.get("prompt"), value["answer"], number))
            entries.passed_over.update(key for key in value if key not in READ)
    except UnicodeError as error:
        raise DataError(f"{printable(path)}: cannot be read as text: {error}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    problems.raise_any(path)
    return entries


def object_problems(value: object, ignored: Collection[str], metadata: Collection[str] = METADATA) -> list[str]:
    """Return what is wrong with the keys and types of one sample's JSON, but not with what its paths lead to."""
    if not isinstance(value, dict):
        return [f"wanted {WANTED}, got {kind_of_value(value)}: {json.dumps(value)[:80]}"]
    problems = key_problems(value, ignored, metadata)
    if problems:
        return problems
    for name in READ:
        text = value.get(name)
        if text is not None and not isinstance(text, str):
            more = "; a sample has one image" if (name, type(text)) == ("image", list) else ""
            problems.append(f'"{name}" is {kind_of_value(text)}, wanted a text in quotes{more}')
    if value.get("answer") is None and "answer" in READ:
        how = "null" if "answer" in value else "missing"
        problems.append(f'"answer" is {how}; wanted {WANTED}, got {_listed(value)}')
    if value.get("image") is None and value.get("prompt") is None and "image" not in metadata:
        problems.append(f'neither "image" nor "prompt" is there; wanted {WANTED}, got {_listed(value)}')
    return problems


def _values(path: Path, problems: _Problems) -> Iterator[tuple[int | str, object]]:
    """Yield (line, value) of a file; a line that is no JSON goes to `problems`."""
    texts = (text for _, line in _lines(path) if (text := _unpadded(line)))
    first = next(texts, "")
    second = next(texts, "")
    texts.close()
    if first.startswith("[") or (not second.startswith("{") and _goes_on(first)):
        yield from _values_of_whole(path, problems)
        return
    for number, line in _lines(path):
        text = _unpadded(line)
        if not text:
            continue
        problem = _problem_with_line(line)
        if problem is None:
            try:
                value = parse_json(text, object_pairs_hook=unique_keys)
            except json.JSONDecodeError as error:
                problem = f" is not JSON: {json_problem(error)}"
            except ValueError as error:
                problem = f": {short_problem(error)}"
        if problem is None:
            yield number, value
        else:
            problems.add(number, problem)


def _unpadded(line: str) -> str:
    """Return a line without white space, byte-order marks of joined files, and the end mark of DOS files."""
    return line.strip().strip("\ufeff\x1a").strip()


def _problem_with_line(line: str) -> str | None:
    if len(line) > LINE_LIMIT:
        return f" has more than {LINE_LIMIT >> 20} million characters"
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        return f" is not UTF-8: byte 0x{byte:02X} at column {error.start + 1}; save the file as UTF-8"
    return None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line); of a line that is too long, LINE_LIMIT characters and one."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            yield number, line
            while len(line) > LINE_LIMIT and not line.endswith("\n"):
                line = file.readline(LINE_LIMIT + 1) or "\n"


def _opened(path: Path) -> TextIOWrapper:
    """Return the file as a text: bytes that are no UTF-8 become surrogates, so that their line can be named."""
    file = open_file(path, FILE_LIMIT)
    start = file.peek(4)[:4]
    encoding = json.detect_encoding(start) if any(start) else "utf-8"  # NUL bytes alone are what a crash leaves
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return TextIOWrapper(file, encoding=encoding, errors=errors, newline=None)


def _goes_on(text: str) -> bool:
    """Return whether an object begins in this line and ends in a later one."""
    try:
        parse_json(text)
    except json.JSONDecodeError as error:
        return text.startswith("{") and error.pos >= len(text)
    except ValueError:
        return False
    return False


def _values_of_whole(path: Path, problems: _Problems) -> Iterator[tuple[str, object]]:
    """Yield (line, value) of an array, or of objects over several lines, up to the first that is no JSON."""
    with _opened(path) as file:
        text = file.read(WHOLE_LIMIT + 1)
    if len(text) > WHOLE_LIMIT:
        problems.add(1, f": one array of more than {WHOLE_LIMIT >> 20} million characters; write an object per line")
        return
    if problem := _problem_with_line(text):
        problems.add(1, problem)
        return
    place = Place(text)
    try:
        for count, (number, value) in enumerate(elements(place), 1):
            yield f"object {count} (line {number})", value
    except json.JSONDecodeError as error:
        number = place.line_at(error.pos)
        problems.add(number, f" is not JSON: {json_problem(error)}")
    except ValueError as error:
        problems.add(place.line_at(place.position), f": {short_problem(error)}")


def _image_path(folder: Path, image: str, roots: list[str]) -> tuple[Path | None, str | None]:
    """Return (path, None), or (None, what is wrong with it); only a path with a backslash is looked for here."""
    if not image.strip():
        return None, '"image" is empty; leave it out, or give null, for a sample of text alone'
    if "\0" in image:
        return None, '"image" holds a NUL, which no file name can'
    if len(image) > NAME_LIMIT // 4 and not _could_be_a_path(image):
        return None, f'"image" is no path, {len(image)} characters: {image[:40]}...'
    if image.startswith("file://"):
        return None, f'"image" is an address, {image[:80]}: give the path alone'
    if ADDRESS.match(image):
        return None, f'"image" is an address, {image[:80]}: nothing is fetched; load it down and give its path'
    if image == "~" or image.startswith("~/"):
        return None, f'"image" is {image[:80]}: ~ is the shell\'s; write the path out'
    if WINDOWS_ROOT.match(image) and not os.path.lexists(folder / image):
        return None, f'"image" is a path of Windows, {image[:80]}: give one of this machine'
    if "\\" in image and not os.path.lexists(folder / image):
        image = image.replace("\\", "/")
    path = folder / image
    if ".." in image and ".." in Path(image).parts and not os.path.isabs(image):
        target = os.path.abspath(path)
        if not any(os.path.commonpath([root, target]) == root for root in roots):
            where = os.path.dirname(target)
            return None, f'"image" leaves the folder of the file: {image[:80]}; --images-from {where} allows it'
    return path, None


def _could_be_a_path(image: str) -> bool:
    longest = max(len(part.encode(errors="replace")) for part in image.split("/"))
    return longest <= NAME_LIMIT and len(image) <= PATH_LIMIT


def kind_of_value(value: object) -> str:
    """Return what JSON calls a value's type, with the number itself."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {str(value)[:20]}"
    names: dict[type, str] = {list: "a list", dict: "an object", str: "a text"}
    return "null" if value is None else names[type(value)]


def _listed(value: dict) -> str:
    return "the keys " + ", ".join(f'"{key[:60]}"' for key in [*value][:8]) if value else "no key"
