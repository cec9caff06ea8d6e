"""Parquet files: columns are keys; images lie in them as bytes and are read when their turn comes, or as paths."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from sat_lora.data.item_files import FILE_LIMIT, collect_entries
from sat_lora.data.reading import Reading
from sat_lora.data.samples import DataCounts, Item, items_of_entries
from sat_lora.errors import DataError
from sat_lora.files.foreign import open_file
from sat_lora.printable import printable

WHOSE = "parquet"
READS_FOLDERS = False
MAGIC = b"PAR1"
STORED = object()
"""Stands for an image whose bytes are there."""
_GROUPS_KEPT = 4  # columns of row groups that were read last, of a process
_ROWS = 1000  # that are looked at together


@dataclass(frozen=True)
class ParquetImage:
    """An image in a column of bytes, or of {"bytes", "path"} as Hugging Face's `datasets` writes it.

    index: of the image in the list that its row has; None where the column has no lists.
    """

    path: str
    group: int
    row: int
    column: str
    index: int | None = None

    def read(self) -> bytes:
        """Return the content of the image's file. Raises OSError or ValueError if it cannot be read."""
        with _arrow_as_value_error():
            cell = _column(self.path, self.group, self.column)[self.row]
            value = (cell if self.index is None else cell.values[self.index]).as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"no bytes in row {self.row} of row group {self.group}")
        return content


def fits(path: Path) -> bool:
    """Return whether a file begins as parquet does."""
    try:
        with open_file(path, FILE_LIMIT) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read(path: Path, reading: Reading, counts: DataCounts, given: Sequence[Path]) -> list[Item]:
    """Return the items of a file: one for each row; a null is a key left out.

    Raises DataError if it cannot be read, or with all rows that cannot be used.
    """
    try:
        if not fits(path):
            raise ValueError("it does not begin as a parquet file does")
        with _arrow_as_value_error():
            columns = _names(path) if reading.columns else ()
            entries = collect_entries(path, _rows(path), reading, columns=columns)
    except (OSError, ValueError) as error:
        problem = str(getattr(error, "strerror", None) or error).splitlines()[0][:200]
        raise DataError(f"{printable(path)}: cannot be read as parquet: {problem}; write or copy it again") from error
    return items_of_entries(path, entries, counts)


@contextmanager
def _arrow_as_value_error() -> Iterator[None]:
    """Raise ValueError for what pyarrow raises of its own, which may be a NotImplementedError or a KeyError."""
    from pyarrow.lib import ArrowException

    try:
        yield
    except ArrowException as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _names(path: Path) -> list[str]:
    from pyarrow import parquet

    return parquet.read_schema(path).names


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (row 3, {column: value}) of each row, with a ParquetImage in place of the bytes of an image."""
    import pyarrow
    from pyarrow import parquet

    types = pyarrow.types
    file = parquet.ParquetFile(path, memory_map=False)
    schema = file.schema_arrow
    number = 0
    with file:
        stored = [name for name in schema.names if _holds_bytes(schema.field(name).type, types)]
        for group in range(file.num_row_groups):
            plain = [name for name in schema.names if name not in stored]
            # Of stored bytes only whether they are there: the sizes of a list of gigabytes are read, not kept.
            rows = file.metadata.row_group(group).num_rows
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=plain, use_threads=False)
            values: Iterator[dict] = (row for batch in batches for row in batch.to_pylist())
            images = {name: _places(path, file, group, name) for name in stored}
            for row in range(rows):
                number += 1
                record: dict[str, Any] = dict(next(values)) if plain else {}
                record |= {name: places[row] for name, places in images.items()}
                yield f"row {number}", {name: value for name, value in record.items() if value is not None}


def _holds_bytes(kind: Any, types: Any) -> bool:
    """Return whether a column is of bytes, of objects with `bytes`, or of lists of those."""
    if _is_list(kind, types):
        return not _is_list(kind.value_type, types) and _holds_bytes(kind.value_type, types)
    if types.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_list(kind: Any, types: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _places(path: Path, file: Any, group: int, name: str) -> list:
    """Return where the image of each row of a group lies: a ParquetImage, its path where it has no bytes, or None; of
    a column of lists, a list of these for each row.
    """
    from pyarrow import compute, types

    places: list[Any] = []
    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[name], use_threads=False):
        column = batch.column(0)
        if not _is_list(column.type, types):
            images = enumerate(_stored_or_path(column), len(places))
            places += [_place(image, str(path), group, row, name) for row, image in images]
            continue
        elements = iter(_stored_or_path(column.flatten()))
        for row, count in enumerate(compute.list_value_length(column).to_pylist(), len(places)):
            images = enumerate(islice(elements, count or 0))
            cell = [_place(image, str(path), group, row, name, index) for index, image in images]
            places.append(None if count is None else cell)
    return places


def _place(image: Any, path: str, group: int, row: int, column: str, index: int | None = None) -> Any:
    return ParquetImage(path, group, row, column, index) if image is STORED else image


def _stored_or_path(column: Any) -> list:
    """Return of each element of bytes, or of objects with `bytes`, STORED, its path where it has no bytes, or None."""
    is_struct = hasattr(column, "field")
    contents = column.field("bytes") if is_struct else column
    paths = _paths_of(column) if is_struct else [None] * len(column)
    rows = zip(column.is_valid().to_pylist(), contents.is_valid().to_pylist(), paths)
    return [(STORED if is_stored else path) if is_there else None for is_there, is_stored, path in rows]


def _paths_of(column: Any) -> list:
    names = [column.type.field(place).name for place in range(column.type.num_fields)]
    return column.field("path").to_pylist() if "path" in names else [None] * len(column)


@lru_cache(maxsize=_GROUPS_KEPT)
def _column(path: str, group: int, column: str) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        # One thread: a loader's workers are forks, and those of a pool are not there in a fork.
        return file.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
