"""Files of JSON: an object per line, or an array of objects."""

from collections.abc import Sequence
from pathlib import Path

from sat_lora.data.item_files import read_entries
from sat_lora.data.layouts import check_file_kind
from sat_lora.data.readers.tables import misnamed_table
from sat_lora.data.reading import Reading
from sat_lora.data.samples import DataCounts, Item, items_of_entries
from sat_lora.errors import DataError
from sat_lora.printable import printable

WHOSE = "JSON"
READS_FOLDERS = False


def fits(path: Path) -> bool:
    """Return True: what no other reader takes is looked at by `read`, which says what it is."""
    return True


def read(path: Path, reading: Reading, counts: DataCounts, given: Sequence[Path]) -> list[Item]:
    """Return the items of a file. Raises DataError, with every line that cannot be used, or what else the file is."""
    table = misnamed_table(path)
    if table is not None:
        raise DataError(f"{printable(path)} {printable(table)}")
    check_file_kind(path)
    return items_of_entries(path, read_entries(path, reading), counts)
