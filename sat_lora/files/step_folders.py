"""Folders of single steps beside each other, and pointers that name one of them.

ROOT/400/      what belongs to step 400, written by `atomic.replaced_folder`
ROOT/latest    a text file that holds `400`; other pointers, such as `best`, likewise

A pointer is moved after the folder it names is whole, and folders are removed after the pointers have moved: whoever
follows a pointer finds a whole folder, whenever the writer died.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import read_bytes

LATEST = "latest"
BEST = "best"
POINTER_LIMIT = 64  # bytes
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


def steps_in(root: Path) -> list[int]:
    """Return the steps that have a folder, in order, without drafts of a writer that died."""
    return sorted(int(path.name) for path in root.glob("[0-9]*") if _STEP.fullmatch(path.name) and path.is_dir())


def read_pointer(pointer: Path) -> int | None:
    """Return the step that a pointer names; None if it is not there, is no such text, or names nothing there."""
    try:
        text = read_bytes(pointer, POINTER_LIMIT).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if _STEP.fullmatch(text) and (pointer.parent / text).is_dir() else None


def follow(path: str | Path) -> Path:
    """Return the folder of a step that `path` means: ROOT/400 for ROOT, or for a pointer such as ROOT/best.

    Any other path is returned as it is.
    """
    path = Path(path)
    pointer = path / LATEST if path.is_dir() else path
    step = read_pointer(pointer)
    return path if step is None else pointer.parent / str(step)


def point_to(root: Path, pointer: str, step: int | None) -> None:
    """Let a pointer name a step whose folder is there; None takes the pointer away."""
    if step is None:
        (root / pointer).unlink(missing_ok=True)
    else:
        replace_text(root / pointer, f"{step}\n")


def prune(root: Path, *, newest: int, keep: int, also: Collection[int | None] = ()) -> None:
    """Remove what step `newest` leaves behind, once it is written and the pointers name what they should.

    Later steps go: they are of a run that was cut, and gone on with from before them. Of the others all but the `keep`
    newest go (0: none), but for those that pointers name and those in `also`; and drafts of writers that died.
    """
    named = {read_pointer(root / pointer) for pointer in (LATEST, BEST)} | {*also}
    steps = steps_in(root)
    earlier = [step for step in steps if step <= newest]
    outdated = earlier[:-keep] if keep else []
    for step in (*outdated, *steps[len(earlier) :]):
        if step not in named:
            _remove(root / str(step))
    for draft in root.glob(".*.tmp-*"):
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft)
        else:
            draft.unlink()


def _remove(folder: Path) -> None:
    """Remove a step's folder, under another name first: no reader finds a part of it, whenever this dies."""
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.with_name(f".{folder.name}.tmp-gone-{os.getpid()}")
    folder.rename(gone)
    shutil.rmtree(gone)


def set_back(root: Path, step: int, best: int | None) -> None:
    """Let the pointers say what holds at `step`, from which a run goes on.

    `latest` names its folder, or the newest before it, and `best` that of step `best`. Nothing is removed but a
    pointer, and none that names the only folders there are.
    """
    if not root.is_dir():
        return
    earlier = [other for other in steps_in(root) if other <= step]
    if earlier and read_pointer(root / LATEST) != earlier[-1]:
        point_to(root, LATEST, earlier[-1])
    named = read_pointer(root / BEST)
    if best in earlier and named != best:
        point_to(root, BEST, best)
    elif best not in earlier and named is not None:
        point_to(root, BEST, None)


def remove_all(root: Path) -> None:
    """Remove every step, the pointers and the drafts, and `root` itself if nothing else is in it."""
    if not root.is_dir():
        return
    for pointer in (LATEST, BEST):
        point_to(root, pointer, None)
    prune(root, newest=-1, keep=0)
    if not any(root.iterdir()):
        root.rmdir()
