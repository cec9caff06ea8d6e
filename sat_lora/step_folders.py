"""Folders of single steps beside each other, and pointers that name one of them.

ROOT/400/      what belongs to step 400, written by `atomic.replaced_folder`
ROOT/latest    a text file that holds `400`; other pointers, such as `best`, likewise

A pointer is moved after the folder it names is whole, and folders are removed after the pointers have moved: whoever
follows a pointer finds a whole folder, whenever the writer died.
"""

import shutil
from pathlib import Path

from sat_lora.atomic import replace_text
from sat_lora.foreign import read_bytes

POINTER_LIMIT, LONGEST_STEP = 256, 18  # bytes of a pointer's file, digits of a step
LATEST, BEST = "latest", "best"


def steps_in(root: Path) -> list[int]:
    """The steps that have a folder, in order; drafts of a writer that died are none."""
    return sorted(int(path.name) for path in root.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())


def read_pointer(pointer: Path) -> int | None:
    """The step that a pointer names; None if there is none, or if it names nothing there."""
    try:
        text = read_bytes(pointer, POINTER_LIMIT).decode("utf-8").strip()
    except (OSError, ValueError):
        return None
    is_step = text.isdecimal() and len(text) <= LONGEST_STEP
    return int(text) if is_step and (pointer.parent / text).is_dir() else None


def follow(path: str | Path) -> Path:
    """The folder of a step that `path` means: ROOT its latest, ROOT/best that of the pointer; else `path`."""
    path = Path(path)
    pointer = path / LATEST if path.is_dir() else path
    step = read_pointer(pointer)
    return path if step is None else pointer.parent / str(step)


def point_to(root: Path, pointer: str, step: int) -> None:
    """Let a pointer name a step whose folder is there."""
    replace_text(root / pointer, f"{step}\n")


def keep_newest(root: Path, count: int) -> None:
    """Remove all folders but the `count` newest (0: none is removed) and those that pointers name, and old drafts."""
    named = {read_pointer(root / pointer) for pointer in (LATEST, BEST)}
    for step in steps_in(root)[:-count] if count else ():
        if step not in named:
            shutil.rmtree(root / str(step))
    for draft in root.glob(".*.tmp-*"):
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def drop_beyond(root: Path, step: int) -> None:
    """Remove the folders of later steps; pointers to them fall back to the newest that is left, or go."""
    later = [one for one in steps_in(root) if one > step]
    left = [one for one in steps_in(root) if one <= step]
    for pointer in (LATEST, BEST):
        if read_pointer(root / pointer) in later:
            if left and pointer == LATEST:
                point_to(root, pointer, left[-1])
            else:
                (root / pointer).unlink()
    for one in later:
        shutil.rmtree(root / str(one))
