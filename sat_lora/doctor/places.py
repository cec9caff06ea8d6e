"""Lines of programs, and which of a stack's is the one to look at."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Of Python and of what is installed: by its form, since another machine may have its library elsewhere.
_FOREIGN = re.compile(r"/(site|dist)-packages/|/lib(64)?/python3(\.\d+)?/")


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


def own_place(frames: Sequence[Place]) -> Place | None:
    """The innermost of the places (innermost first) that is neither Python's nor an installed package's."""
    return next((place for place in frames if not _is_foreign(place.file)), frames[0] if frames else None)


def _is_foreign(file: str) -> bool:
    if "/sat_lora/" in file:  # ours, and it may be installed
        return "/sat_lora/doctor/" in file
    return file.startswith("<") or _FOREIGN.search(file) is not None
