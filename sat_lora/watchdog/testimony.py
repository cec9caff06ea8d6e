"""What a rank of a run that hangs can still say: where its threads are, and which collectives it has made.

Written by the watchdog's thread beside `trace`'s files: rank_00003.stacks.txt for people, by faulthandler, which works
in any state of the interpreter; rank_00003.stacks.json and rank_00003.flight for the verdict.
"""

import faulthandler
import json
import linecache
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import read_json
from sat_lora.watchdog.flight_record import write_flight_record
from sat_lora.watchdog.places import Place, own_place, places_of
from sat_lora.watchdog.rank_files import file_of

STACKS = ".stacks.json"
STACKS_TEXT = ".stacks.txt"
_WAITING = (
    "/torch/distributed/distributed_c10d.py",
    "/torch/distributed/_functional_collectives.py",
    "/deepspeed/comm/torch.py",
    "/deepspeed/comm/comm.py",
)
_ZERO = "/deepspeed/runtime/zero/"
_BACKWARD = ("/torch/autograd/graph.py", "/torch/autograd/__init__.py")


@dataclass(frozen=True)
class Thread:
    """A thread of a rank, and where it was."""

    name: str
    is_main: bool
    frames: tuple[Place, ...]
    """Innermost first."""

    @property
    def waits_in_collective(self) -> bool:
        """Whether it is inside a call of torch.distributed, or waits for what one has started, and goes no deeper."""
        return any(place.file.endswith(_WAITING) or _waits_for_gather(place) for place in self.frames[:12])

    @property
    def waits_for_autograd(self) -> bool:
        """Whether it has called torch's engine, whose own threads then run the backward pass."""
        return any(place.file.endswith(_BACKWARD) for place in self.frames[:3])

    @property
    def may_be_autograds(self) -> bool:
        """Whether it runs own code and Python did not start it: so it is with the threads of torch's engine."""
        started_by_python = any(place.function == "_bootstrap" for place in self.frames[-1:])
        return not self.is_main and not started_by_python and any(place.is_own for place in self.frames)

    @property
    def place(self) -> Place | None:
        """The innermost line of the project's or the user's own code."""
        return own_place(self.frames)


def _waits_for_gather(place: Place) -> bool:
    """Return whether it is ZeRO-3's wait for weights: the call that waits is no Python, and leaves no frame."""
    return place.function == "wait" and _ZERO in place.file


def testify(folder: Path, rank: int) -> None:
    """Write this process's files; called by a thread that is none of the run's. Raises OSError if they cannot be."""
    with open(file_of(folder, rank, STACKS_TEXT), "w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    write_flight_record(folder, rank)
    replace_text(file_of(folder, rank, STACKS), json.dumps(_threads()))  # last: the others wait for it


def has_testified(folder: Path, rank: int) -> bool:
    """Return whether a rank has written its files to the end."""
    return file_of(folder, rank, STACKS).is_file()


def read_threads(folder: Path, rank: int, package: str | None) -> list[Thread]:
    """Return the threads of a rank; none if it has not testified.

    package: as of `places_of`. Raises ValueError, TypeError or LookupError if the file says something else.
    """
    path = file_of(folder, rank, STACKS)
    entries = read_json(path) if path.is_file() else []
    return [Thread(e["name"], e["main"], places_of(e["frames"], package)) for e in entries]


def _threads() -> list[dict]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    this_thread = threading.get_ident()
    main = threading.main_thread().ident
    return [
        dict(name=names.get(ident, "?"), main=ident == main, frames=[_place(frame) for frame in _outwards(top)])
        for ident, top in sys._current_frames().items()
        if ident != this_thread
    ]


def _outwards(frame: FrameType | None):
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frame: FrameType) -> list:
    file = frame.f_code.co_filename
    line = frame.f_lineno
    return [file, line, frame.f_code.co_name, linecache.getline(file, line).strip()]
