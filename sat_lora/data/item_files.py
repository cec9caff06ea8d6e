"""Files of samples as people, editors and systems write them: one JSON object per line, or an array of such objects.

Lines end in \\n, \\r\\n or \\r, and nothing else ends one. UTF-8, with or without a byte-order mark, UTF-16 and UTF-32.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path

from sat_lora.data.box_texts import picture_size, with_boxes
from sat_lora.data.image_sources import StoredImage, image_source
from sat_lora.data.json_texts import Place, elements, json_problem, short_problem, unique_keys
from sat_lora.data.reading import Reading, check_columns, samples_of
from sat_lora.data.records.record import Record, RecordError
from sat_lora.errors import DataError
from sat_lora.files.foreign import open_file, parse_json
from sat_lora.printable import printable

FILE_LIMIT = 1 << 40  # bytes: a file is read line by line
LINE_LIMIT = 1 << 27  # characters of a line, which is in memory as a whole
WHOLE_LIMIT = 1 << 28  # the same of an array
SHOWN = 10  # problems of a file


@dataclass(frozen=True)
class Entry:
    """One sample of a file. images: of `record`, as paths or the content of their files. line: its number; of an object
    in an array, `object 3 (line 7)`; of a table, `row 3`.
    """

    record: Record
    images: tuple[Path | bytes | StoredImage, ...]
    line: int | str


@dataclass
class Entries:
    """The samples that a file holds.

    passed_over: how many objects have a key that is not read, by its name. layouts: how many are of each layout.
    """

    objects: list[Entry] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)


@dataclass
class Problems:
    """Problems as texts, each with the lines that have it, in the order in which they came up."""

    lines: dict[str, list[int | str]] = field(default_factory=dict)

    def add(self, number: int | str, text: str) -> None:
        """Note a problem of the line, or object, of that number."""
        self.lines.setdefault(printable(text), []).append(number)

    def raise_any(self, path: Path) -> None:
        """Raise DataError with all problems, in the name of the file, if there are any."""
        if not self.lines:
            return
        count = len({number for numbers in self.lines.values() for number in numbers})
        shown = [_described(text, numbers) for text, numbers in [*self.lines.items()][:SHOWN]]
        shown += ["..."] * (len(self.lines) > SHOWN)
        lines = "1 line" if count == 1 else f"{count} lines"
        places = [number for numbers in self.lines.values() for number in numbers if isinstance(number, str)]
        if places:
            what = "row" if places[0].startswith("row ") else "object"
            lines = f"1 {what}" if count == 1 else f"{count} {what}s"
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


def read_entries(path: str | Path, reading: Reading) -> Entries:
    """Return the samples of a file of JSON, whatever its name; none if it holds nothing but white space.

    Raises DataError if it is no regular file or cannot be read, or with every wrong line of it.
    """
    path = Path(path)
    problems = Problems()
    try:
        return collect_entries(path, _values(path, problems), reading, problems)
    except UnicodeError as error:
        raise DataError(f"{printable(path)}: cannot be read as text: {error}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def collect_entries(
    path: Path,
    values: Iterable[tuple[int | str, object]],
    reading: Reading,
    problems: Problems | None = None,
    columns: Collection[str] = (),
) -> Entries:
    """Return the samples of a file's objects. values: (line, object). problems: those that are known, or come up while
    `values` is gone through. columns: keys that the file has, though all its objects may leave them out.

    Raises DataError with every object that cannot be used, and all problems, or for --columns that it has not.
    """
    entries = Entries()
    problems = Problems() if problems is None else problems
    folder = path.parent
    options = replace(reading.records, folder=folder)
    roots = [os.path.abspath(root) for root in (folder, *reading.images_from)]
    keys = dict.fromkeys(columns)
    for number, value in values:
        if options.columns and isinstance(value, dict):
            keys.update(dict.fromkeys(value))
        try:
            records, passed_over, layout = samples_of(value, options)
            for record in records:
                images = tuple([image_source(image, folder, roots) for image in record.images])
                entries.objects.append(Entry(with_boxes(record, images, picture_size), images, number))
        except RecordError as error:
            problems.add(number, ": " + "; ".join(error.problems))
            continue
        if passed_over:
            entries.passed_over.update(passed_over)
        entries.layouts[layout] += len(records)
    problems.raise_any(path)
    check_columns(path, options.columns, keys)
    return entries


def _values(path: Path, problems: Problems) -> Iterator[tuple[int | str, object]]:
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


def _values_of_whole(path: Path, problems: Problems) -> Iterator[tuple[str, object]]:
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
