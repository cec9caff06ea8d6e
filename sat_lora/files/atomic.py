"""Replace a folder or a small file so that a reader sees the old one or the new one, never a mixture."""

import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


@contextmanager
def replaced_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty temporary sibling to write into; it takes the place of `target` when the block ends well.

    Everything is fsynced first. Leftovers of writers that died are removed. A link is followed, so that it stays one.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    leftovers = list(target.parent.glob(f".{glob.escape(target.name)}.tmp-*"))
    for aside in leftovers:
        if not target.exists() and aside.name.startswith(f".{target.name}.tmp-old-"):
            aside.rename(target)  # the writer died between the two renames of `_exchange`
    for stale in leftovers:
        shutil.rmtree(stale, ignore_errors=True)
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if target.exists():
            _exchange(temporary, target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_text(path: str | Path, text: str) -> None:
    """Write a sibling file, fsync it, then rename it into place: the same for a small text file.

    Raises OSError if it could not be written; the old one stays, and no draft is left.
    """
    replace_lines(path, [text])


def replace_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Do what `replace_text` does with lines that are made one after the other, each with its end."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step (Linux renameat2); afterwards `new` holds what `old` held."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(old))
    # A file system without exchange: two renames, with a moment in which only the temporary names exist.
    aside = old.with_name(f".{old.name}.tmp-old-{os.getpid()}")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
