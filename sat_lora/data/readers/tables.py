"""Tables of text: the first row has the names of the columns, which are those of an object's keys."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from sat_lora.data.formats import HEAD, JSON_SUFFIXES, SEPARATORS, encoding_of, kind_of_file, separator_of, texts_of
from sat_lora.data.item_files import FILE_LIMIT, LINE_LIMIT, collect_entries
from sat_lora.data.item_keys import NAMES, READ_INSTEAD
from sat_lora.data.reading import Reading
from sat_lora.data.records.record import TURNS, listed
from sat_lora.data.samples import DataCounts, Item, items_of_entries
from sat_lora.errors import DataError
from sat_lora.files.foreign import open_file
from sat_lora.printable import printable

WHOSE = "a table"
READS_FOLDERS = False
SUFFIXES = (".csv", ".tsv", ".tab")


def fits(path: Path) -> bool:
    """Return whether a file is a table by its suffix, or its first row has names of columns that are known."""
    try:
        head = _head(path)
    except (OSError, ValueError):
        return False
    kind = kind_of_file(head, path.suffix) or ""
    if path.suffix.lower() in JSON_SUFFIXES or head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")[:1] in (b"{", b"["):
        return False
    return kind.startswith("holds a table") and (path.suffix.lower() in SUFFIXES or bool(_known(_columns(head, path))))


def misnamed_table(path: Path) -> str | None:
    """Return that a file named as JSON holds a table, and what to do, as the end of a sentence; None if not."""
    try:
        head = _head(path)
    except (OSError, ValueError):
        return None
    text = texts_of(head)[0].lstrip("\ufeff \t\r\n")
    rows = [line for line in text.splitlines() if line.strip()]
    if path.suffix.lower() not in JSON_SUFFIXES or text.startswith(("{", "[")) or len(rows) < 2:
        return None
    kind = kind_of_file(head, "") or ""
    if not kind.startswith("holds a table") or not _known(_columns(head, path)):
        return None
    suffix = ".tsv" if "tabs" in kind else ".csv"
    return f"{kind}, and its name says JSON; call it {path.stem}{suffix}, or give --data-format csv"


def read(path: Path, reading: Reading, counts: DataCounts, given: Sequence[Path]) -> list[Item]:
    """Return the items of a table: one for each row; an empty cell is a key left out.

    Raises DataError if its first row has no name that is known, it is no UTF-8 or UTF-16, or with all rows that cannot
    be used.
    """
    try:
        with open_file(path, FILE_LIMIT) as file:
            head = file.read(HEAD)
        columns = _columns(head, path)
        named = {*reading.records.columns.values()} & {*columns}
        if not named and not _known(columns):
            raise DataError(
                f"{printable(path)} holds a table, but its first row has no name of a column that is known; wanted "
                f"{listed(NAMES)} or what others call them, got {printable(listed(columns, 8)) or 'nothing'}; "
                "--columns prompt=COLUMN answer=COLUMN says which are meant"
            )
        names = [name.strip() for name in columns]
        entries = collect_entries(path, _rows(path, head), reading, columns=names)
    except UnicodeError as error:
        raise DataError(f"{printable(path)}: cannot be read as text: {error}; save it as UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return items_of_entries(path, entries, counts)


def _head(path: Path) -> bytes:
    with open_file(path, FILE_LIMIT) as file:
        return file.read(HEAD)


def _known(columns: Sequence[str]) -> list[str]:
    """Return those of the columns that have a name which is known."""
    plain = [name.strip().casefold().replace("-", "_").replace(" ", "_") for name in columns]
    return [name for name in plain if name in (*NAMES, *TURNS, "history", "system") or name in READ_INSTEAD]


def _separator(head: bytes, path: Path) -> str:
    """Return what stands between the columns; "sep=;" in a first line says it, as Excel writes it."""
    text = texts_of(head)[0].lstrip("\ufeff")
    first = text.splitlines()[0] if text.splitlines() else ""
    if first.lower().startswith("sep=") and len(first) == 5:
        return first[4]
    mark = "\t" if path.suffix.lower() in (".tsv", ".tab") else separator_of(text)
    return mark or max(SEPARATORS, key=first.count)


def _columns(head: bytes, path: Path) -> list[str]:
    """Return the names of the columns, as far as the head of the file has them."""
    text = texts_of(head)[0].lstrip("\ufeff")
    rows = csv.reader(io.StringIO(text), delimiter=_separator(head, path))
    try:
        return next((row for row in rows if _is_header(row)), [])
    except csv.Error:
        return []


def _is_header(row: list[str]) -> bool:
    return any(cell.strip() for cell in row) and not (len(row) <= 2 and row[0].lower().startswith("sep="))


def _rows(path: Path, head: bytes) -> Iterator[tuple[str, dict]]:
    """Yield (row 3, {column: text}) of each row that is not empty. Raises ValueError where a row has other cells."""
    encoding = encoding_of(head)
    encoding = "utf-8-sig" if encoding.startswith("utf-8") else encoding
    csv.field_size_limit(LINE_LIMIT)
    with io.TextIOWrapper(open_file(path, FILE_LIMIT), encoding=encoding, newline="") as file:
        rows = csv.reader(file, delimiter=_separator(head, path), strict=True)
        columns: list[str] = []
        for number, row in enumerate(rows, 1):
            if not any(cell.strip() for cell in row):
                continue
            if not columns:
                if _is_header(row):
                    columns = [cell.strip().lstrip("\ufeff") for cell in row]
                    _check_header(columns)
                continue
            if len(row) != len(columns):
                raise ValueError(
                    f"row {number} has {len(row)} cells and the first {len(columns)}; a text with a separator in it "
                    "stands in quotes"
                )
            yield f"row {number}", {name: cell for name, cell in zip(columns, row) if cell != "" and name}


def _check_header(columns: Sequence[str]) -> None:
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ValueError(f"the first row has {listed(twice)} twice; rename one")
