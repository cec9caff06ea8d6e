"""Our own keys, image, prompt and answer, also under the names that others have for them."""

from collections.abc import Mapping
from typing import Any

from sat_lora.data.records.record import Fields, RecordOptions

WHOSE = "prompt and answer"
NAMES_PLACES = False


def fits(record: Mapping[str, Any]) -> bool:
    """Return True: what no other layout takes is read by its keys, which are checked one by one."""
    return True


def rewrite(record: Fields, options: RecordOptions) -> list[Fields]:
    """Return the record as it is, in a list."""
    return [record]
