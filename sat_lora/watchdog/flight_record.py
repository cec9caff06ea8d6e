"""The last collectives of a rank, from torch's flight recorder: gloo and NCCL both fill it.

The watchdog writes the recorder's own dump beside the other files, rank_00003.flight. Where NCCL's watchdog was faster,
there is nccl_trace_rank_3 in the same folder, in the same form. It is a pickle; nothing but plain values is read.
"""

import io
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sat_lora.files.foreign import MEBIBYTE, read_bytes
from sat_lora.watchdog.places import Place, own_place, places_of, source_line
from sat_lora.watchdog.rank_files import NCCL_DUMP, file_of

FLIGHT = ".flight"
FLIGHT_LIMIT = 256 * MEBIBYTE  # the recorder keeps some thousand entries


@dataclass(frozen=True)
class Collective:
    """One entry of torch's flight recorder."""

    group: str
    number: int
    """Within the group, from 1."""
    operation: str
    """What it does, such as gloo:all_reduce."""
    sizes: str
    is_done: bool | None
    """Whether it is through, None where the backend does not say: gloo."""
    place: Place | None

    @property
    def words(self) -> str:
        """The operation, its sizes and its place, as a clause."""
        where = f" in {self.place.words}" if self.place else ""
        return f"{self.operation} of {self.sizes}{where}"


def write_flight_record(folder: Path, rank: int) -> None:
    """Write the dump of this process; nothing where torch has no recorder. Raises OSError if it cannot."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
    if dump is not None:
        file_of(folder, rank, FLIGHT).write_bytes(dump())


def read_collectives(folder: Path, rank: int, package: str | None) -> list[Collective]:
    """Return the collectives of a rank in the order in which it made them; none if it has left no dump.

    package: as of `places_of`. Raises ValueError if a file is no such dump.
    """
    files = [file_of(folder, rank, FLIGHT), folder / f"{NCCL_DUMP}{rank}"]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return []
    try:
        dump = _PlainValues(io.BytesIO(read_bytes(path, FLIGHT_LIMIT))).load()
        return [_collective(entry, package) for entry in dump.get("entries", [])]
    # Bytes that are no pickle end in whatever its commands come to.
    except (
        pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ArithmeticError, RuntimeError,
        MemoryError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} is no dump of torch's flight recorder: {error}") from error


class _PlainValues(pickle.Unpickler):
    """A reader of pickles that takes numbers, texts, lists and dictionaries, and runs nothing."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no plain value")


def _collective(entry: dict, package: str | None) -> Collective:
    frames = [(f["filename"], f["line"], f["name"], "") for f in entry.get("frames", [])]
    places = places_of(frames, package)
    place = own_place(places)
    operation = entry["profiling_name"]
    if place is not None:
        place = replace(place, code=source_line(place.file, place.line))
    number = entry["collective_seq_id"]
    if type(number) is not int or not isinstance(operation, str):
        raise TypeError(f"collective {number!r} is {operation!r}")
    return Collective(
        group=" ".join(filter(None, entry["process_group"])),
        number=number,
        operation=operation,
        sizes="+".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"]) or "nothing",
        is_done=None if operation.startswith("gloo") else entry["state"] == "completed",
        place=place,
    )
