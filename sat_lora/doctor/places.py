"""Lines of programs, and which of a stack's is the one to look at."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import sat_lora

PACKAGE = str(Path(sat_lora.__file__).parent)
"""This process's sat_lora: the start of its files' names in every frame, and so not resolved."""

# Of Python and of what is installed: by its form, since another machine may have its library elsewhere.
_FOREIGN = re.compile(r"/(site|dist)-packages/|/lib(64)?/python3(\.\d+)?/")


@dataclass(frozen=True)
class Place:
    """A line of a program."""

    file: str
    line: int
    function: str
    code: str
    is_own: bool
    """Whether the line is the project's or the user's: neither Python's, an installed package's nor the doctor's."""

    @property
    def words(self) -> str:
        return f"{self.function} ({self.file}:{self.line})" + (f": {self.code}" if self.code else "")


def places_of(frames: Iterable[Sequence], package: str | None) -> tuple[Place, ...]:
    """The places of frames, each [file, line, function, code].

    package: `PACKAGE` of the process that they come from, perhaps on another machine; None: it has not kept that.
    """
    return tuple(Place(*frame, is_own=_is_own(frame[0], package)) for frame in frames)


def own_place(places: Sequence[Place]) -> Place | None:
    """The innermost of the places (innermost first) that is own, or the innermost where none is."""
    return next((place for place in places if place.is_own), places[0] if places else None)


def _is_own(file: str, package: str | None) -> bool:
    package = package or _package_by_form(file)
    if package is not None and PurePath(file).is_relative_to(package):  # ours, and it may be installed
        return not PurePath(file).is_relative_to(PurePath(package, "doctor"))
    return not file.startswith("<") and _FOREIGN.search(file) is None


def _package_by_form(file: str) -> str | None:
    """The innermost folder called sat_lora around the file, unless packages are installed below that one."""
    folder, name, below = file.rpartition("/sat_lora/")
    return f"{folder}/sat_lora" if name and _FOREIGN.search(f"/{below}") is None else None
