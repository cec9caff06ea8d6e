"""What a rank of a run that hangs can still say: where its threads are, and which collectives it has made.

Written by the watchdog's thread beside `trace`'s files: rank_00003.stacks.txt for people, by faulthandler, which works
in any state of the interpreter; rank_00003.stacks.json and rank_00003.collectives.json for the verdict.
"""

import faulthandler
import json
import linecache
import pickle
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from sat_lora.atomic import replace_text
from sat_lora.doctor.trace import file_of

STACKS, STACKS_TEXT, COLLECTIVES = ".stacks.json", ".stacks.txt", ".collectives.json"
# Of Python and of what is installed: by its form, since another machine may have its library elsewhere.
_FOREIGN = re.compile(r"/(site|dist)-packages/|/lib(64)?/python3(\.\d+)?/")
_WAITING = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/torch.py", "deepspeed/comm/comm.py")


@dataclass(frozen=True)
class Place:
    """A line of a program."""

    file: str
    line: int
    function: str
    code: str

    @property
    def words(self) -> str:
        return f"{self.function} ({self.file}:{self.line})" + (f": {self.code}" if self.code else "")


@dataclass(frozen=True)
class Thread:
    name: str
    is_main: bool
    frames: tuple[Place, ...]
    """Innermost first."""

    @property
    def waits_in_collective(self) -> bool:
        """Whether it is inside a call of torch.distributed and goes no deeper than that."""
        inner = [place.file.replace("\\", "/") for place in self.frames[:12]]
        return any(file.endswith(_WAITING) for file in inner)

    @property
    def place(self) -> Place | None:
        """The innermost line of the project's or the user's own code."""
        return own_place(self.frames)


@dataclass(frozen=True)
class Collective:
    """One entry of torch's flight recorder."""

    group: str
    number: int
    """Within the group, from 1."""
    operation: str
    """As gloo:all_reduce."""
    sizes: str
    is_done: bool | None
    """None where the backend does not say: gloo."""
    place: Place | None

    @property
    def words(self) -> str:
        where = f" in {self.place.words}" if self.place else ""
        return f"{self.operation} of {self.sizes}{where}"


def testify(folder: Path, rank: int) -> None:
    """Write this process's files; called by a thread that is none of the run's. OSError: they cannot be written."""
    with open(file_of(folder, rank, STACKS_TEXT), "w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    replace_text(file_of(folder, rank, COLLECTIVES), json.dumps(_flight_record()))
    replace_text(file_of(folder, rank, STACKS), json.dumps(_threads()))  # last: the others wait for it


def has_testified(folder: Path, rank: int) -> bool:
    return file_of(folder, rank, STACKS).is_file()


def read_threads(folder: Path, rank: int) -> list[Thread]:
    """Empty if the rank has not testified. ValueError: the file is no JSON."""
    path = file_of(folder, rank, STACKS)
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [Thread(e["name"], e["main"], tuple(Place(*f) for f in e["frames"])) for e in entries]


def read_collectives(folder: Path, rank: int) -> list[Collective]:
    """In the order in which the rank made them; empty if it has not testified. ValueError: the file is no JSON."""
    path = file_of(folder, rank, COLLECTIVES)
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [Collective(**{**e, "place": Place(*e["place"]) if e["place"] else None}) for e in entries]


def own_place(frames) -> Place | None:
    """The innermost of the places (innermost first) that is neither Python's nor an installed package's."""
    return next((place for place in frames if not _is_foreign(place.file)), frames[0] if frames else None)


def _is_foreign(file: str) -> bool:
    if "/sat_lora/" in file:  # ours, and it may be installed
        return "/sat_lora/doctor/" in file
    return file.startswith("<") or _FOREIGN.search(file) is not None


def _threads() -> list[dict]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own, main = threading.get_ident(), threading.main_thread().ident
    return [
        dict(name=names.get(ident, "?"), main=ident == main, frames=[_place(frame) for frame in _outwards(top)])
        for ident, top in sys._current_frames().items()
        if ident != own
    ]


def _outwards(frame: FrameType | None):
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frame: FrameType) -> list:
    file, line = frame.f_code.co_filename, frame.f_lineno
    return [file, line, frame.f_code.co_name, linecache.getline(file, line).strip()]


def _flight_record() -> list[dict]:
    """The last collectives of this process, as torch's flight recorder has them; nothing where there is none."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
    if dump is None:
        return []
    found = pickle.loads(dump())  # made by torch in this very process
    entries = []
    for entry in found.get("entries", []):
        places = [Place(f["filename"], f["line"], f["name"], "") for f in entry.get("frames", [])]
        place, operation = own_place(places), entry["profiling_name"]
        if place is not None:
            code = linecache.getline(place.file, place.line).strip()
            place = [place.file, place.line, place.function, code]
        done = None if operation.startswith("gloo") else entry["state"] == "completed"
        entries.append(
            dict(
                group=" ".join(filter(None, entry["process_group"])),
                number=entry["collective_seq_id"],
                operation=operation,
                sizes="+".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"]) or "nothing",
                is_done=done,
                place=place,
            )
        )
    return entries
