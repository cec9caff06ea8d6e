"""Which files in a folder are pictures to train on, and what is left out there."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from sat_lora.cogvlm.inputs.pictures import SUFFIXES, UNREAD_SUFFIXES
from sat_lora.errors import DataError
from sat_lora.files.foreign import kind_of
from sat_lora.printable import printable

SYSTEM_FOLDERS = frozenset(
    "__macosx @eadir @tmp @sharebin #recycle $recycle.bin @recycle #snapshot ~snapshot @recently-snapshot lost+found "
    "recycler __pycache__".split()
) | {"system volume information"}
"""Folders of operating systems and storage boxes, in lower case; hidden ones need no name here. They hold thumbnails,
what was deleted, and what was there before."""

RUN = "run.json"
RUN_NAMES = frozenset(
    f"{RUN} train.jsonl evaluation.json loss.png norms.png lock adapter checkpoints tensorboard watchdog".split()
)
"""What a run writes into its folder; where that lies in a data folder, a later run would learn its pictures."""

_UNREADABLE = "folder "
SHOWN = 10  # folders
_CONFLICT = re.compile(r"\((?:.*\s)?(?:conflicted copy|sfconflict)\b.*\)$|\.sync-conflict-\d{8}-\d{6}", re.IGNORECASE)
_LATIN = r"(?:another |\d+(?:st|nd|rd|th) )?copy|kop(?:ie|ia|i|io|ya)|copi[ea]|c(?:ó|o\u0301|ò)pia|коп[иі]я"
_WRITTEN_ON = r"的?副本|的?拷[贝貝]|のコピー|コピー|복사본|사본"  # without a space before them as well
_COPY_WORD = re.compile(rf"-checkpoint|~$|\.(?:bak|backup|orig|old)$|{_LATIN}|{_WRITTEN_ON}", re.IGNORECASE)
_COPIES = (
    re.compile(r"(?P<original>.+)-checkpoint"),  # of Jupyter
    re.compile(r"(?P<original>.+?)(?:~|\.(?:bak|backup|orig|old))", re.IGNORECASE),
    re.compile(
        rf"(?P<original>.+?)(?:(?: [-–—] | \(| )(?:{_LATIN}|{_WRITTEN_ON})|(?:{_WRITTEN_ON}))"
        r"(?: ?\(\d+\)| \d+)?\)?(?: ?\(\d+\))?",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?:(?:copy|kopie|kopia|copie|copia|c(?:ó|o\u0301)pia)(?: \(\d+\))? (?:of|von|van|de|di|av)|копия) "
        r"(?P<original>.+)",
        re.IGNORECASE,
    ),
)
"""What systems call a copy, in the languages in which they do. It is one where the original lies beside it."""


def find_images(
    folders: Sequence[str | Path], left_out: Counter | None = None, run_folder: str | Path | None = None
) -> list[Path]:
    """Return every picture file in and below the folders, sorted.

    A picture is a regular file, or a link to one, with a suffix of SUFFIXES in any case. None are: hidden files and
    folders, those of SYSTEM_FOLDERS, what a run of this program wrote, and copies that an editor or a system made of a
    picture beside them. Each folder is gone through once, however many links lead there; a link to a folder that it
    lies in is not followed.
    left_out: what is no picture is added to it (reason: how many). run_folder: of the run that asks; what it has there
    already is not counted. Raises DataError if one of `folders` is missing or cannot be read.
    """
    left_out = Counter() if left_out is None else left_out
    pictures: set[str] = set()
    visited: set[tuple[int, int]] = set()
    linked: list[str] = []
    run = None if run_folder is None else os.path.realpath(run_folder)
    for folder in map(str, map(Path, folders)):
        if not os.path.isdir(folder):
            raise DataError(f"{printable(folder)}: no such folder; give a folder of images or a .jsonl file")
        try:
            with os.scandir(folder):
                pass
        except OSError as error:
            raise DataError(f"{printable(folder)}: cannot be read: {error.strerror}; make it readable") from error
        _go_through(folder, visited, pictures, linked, left_out, run)
    # After all that lies there itself, so that a picture is known by its own path where it has one.
    while linked:
        batch = sorted(linked)
        linked = []
        for folder in batch:
            _go_through(folder, visited, pictures, linked, left_out, run)
    return [Path(path) for path in sorted(pictures, key=lambda path: path.split(os.sep))]


def _go_through(
    top: str, visited: set, pictures: set[str], linked: list[str], left_out: Counter, run: str | None
) -> None:
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            left_out[f"{_UNREADABLE}{printable(folder)} cannot be read: {error.strerror}"] += 1
            continue
        names = {entry.name for entry in entries}
        is_asking_run = run is not None and os.path.realpath(folder) == run
        of_run = RUN_NAMES if RUN in names or is_asking_run else frozenset()
        for entry in entries:
            if entry.name in of_run:
                if not is_asking_run:
                    left_out["files and folders of a run"] += 1
            elif is_no_data(entry.name):
                left_out["hidden, or of the system"] += 1
            elif _is_folder(entry):
                if not entry.is_symlink():
                    folders.append(entry.path)
                elif _lies_in_its_target(entry.path):
                    left_out["links to a folder that they lie in"] += 1
                else:
                    linked.append(entry.path)
            else:
                reason = _reason_to_leave_out(entry, names)
                if reason is None:
                    pictures.add(entry.path)
                else:
                    left_out[reason] += 1


def is_no_data(name: str) -> bool:
    """Return whether a file or folder of that name is an editor's, a system's or nobody's, whatever it holds."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_FOLDERS


def is_no_data_path(path: str) -> bool:
    """Return whether `is_no_data` holds for any part of a member's path in an archive."""
    return any(part not in (".", "..") and is_no_data(part) for part in PurePosixPath(path).parts)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _lies_in_its_target(link: str) -> bool:
    target = os.path.realpath(link)
    parent = os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([target, parent]) == target


def _reason_to_leave_out(entry: os.DirEntry, names: set[str]) -> str | None:
    stem, suffix = os.path.splitext(entry.name)
    lower = suffix.lower()
    if lower not in SUFFIXES:
        shown = f"{printable(lower)} files" if lower and len(lower) < 20 else "files without a suffix"
        return f"{shown} (not read; convert to PNG or JPEG)" if lower in UNREAD_SUFFIXES else shown
    try:
        if not entry.is_file():
            mode = entry.stat().st_mode
            return f"{kind_of(mode)} under the name of a picture" if not stat.S_ISREG(mode) else None
    except OSError:
        return "links to nothing"
    if ("conflict" in stem.lower() and _CONFLICT.search(stem)) or _is_copy(stem, suffix, names):
        return "copies that an editor or a system made"
    return None


def _is_copy(stem: str, suffix: str, names: set[str]) -> bool:
    if not _COPY_WORD.search(stem):
        return False
    matches = (pattern.fullmatch(stem) for pattern in _COPIES)
    return any(match is not None and match["original"] + suffix in names for match in matches)


def unreadable_folders(left_out: Mapping[str, int]) -> list[str]:
    """Return, of the reasons that `find_images` gives, those of folders whose pictures are missing."""
    return [reason for reason in left_out if reason.startswith(_UNREADABLE)]


def unreadable_notes(left_out: Mapping[str, int], option: str) -> list[str]:
    """Return a line for each folder that cannot be read, of an option's paths; SHOWN of them by name."""
    folders = unreadable_folders(left_out)
    notes = [f"{option}: {reason}; its images are left out: make it readable, or take it away" for reason in folders]
    more = len(folders) - SHOWN
    return [*notes[:SHOWN], *([f"{option}: and {more} more folders that cannot be read"] if more > 0 else [])]


def left_out_lines(left_out: Counter) -> Iterator[str]:
    """Yield the counts as text, the largest first."""
    for reason, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0])):
        yield f"{count} {reason}"
