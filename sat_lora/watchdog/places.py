"""Lines of programs, and which of a stack's is the one to look at."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import sat_lora
from sat_lora.files.foreign import MEBIBYTE, read_bytes

PACKAGE = str(Path(sat_lora.__file__).parent)
"""This process's sat_lora: the start of its files' names in every frame, and so not resolved."""

SOURCE_LIMIT = 16 * MEBIBYTE  # of a program's file

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
        """The function, file and line, with the code if it is known."""
        return f"{self.function} ({self.file}:{self.line})" + (f": {self.code}" if self.code else "")


def places_of(frames: Iterable[Sequence], package: str | None) -> tuple[Place, ...]:
    """Return the places of frames, each [file, line, function, code].

    package: `PACKAGE` of the process that they come from, perhaps on another machine; None: it has not kept that.
    Raises TypeError if a frame is none, or the package is no text.
    """
    if not isinstance(package, str | None):
        raise TypeError(f"package {package!r} is no text")
    frames = list(frames)
    for frame in frames:
        if not isinstance(frame, list | tuple) or [*map(type, frame)] != [str, int, str, str]:
            raise TypeError(f"{str(frame)[:80]} is no frame of a stack")
    return tuple(Place(file, line, function, code, _is_own(file, package)) for file, line, function, code in frames)


def source_line(file: str, line: int) -> str:
    """Return that line of a program, stripped; "" where the file is no Python file that can be read here."""
    lines = _source_lines(file) if file.endswith(".py") else ()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


@functools.lru_cache(maxsize=64)
def _source_lines(file: str) -> tuple[str, ...]:
    try:
        return tuple(read_bytes(file, SOURCE_LIMIT).decode("utf-8", "replace").splitlines())
    except (OSError, ValueError):
        return ()


def own_place(places: Sequence[Place]) -> Place | None:
    """Return the innermost of the places (innermost first) that is own; the innermost if none is, None without any."""
    return next((place for place in places if place.is_own), places[0] if places else None)


def _is_own(file: str, package: str | None) -> bool:
    package = package or _package_by_form(file)
    if package is not None and PurePath(file).is_relative_to(package):  # ours, and it may be installed
        return not any(PurePath(file).is_relative_to(PurePath(package, folder)) for folder in ("watchdog", "doctor"))
    return not file.startswith("<") and _FOREIGN.search(file) is None


def _package_by_form(file: str) -> str | None:
    """Return the innermost folder called sat_lora around the file; None if packages are installed below that one."""
    folder, name, below = file.rpartition("/sat_lora/")
    return f"{folder}/sat_lora" if name and _FOREIGN.search(f"/{below}") is None else None
