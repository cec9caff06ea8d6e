"""One writer at a time in a run folder: a lock that every rank holds for as long as it lives.

FOLDER/lock is a text that says who writes (JSON: what is done, host, process, when that began, and the same of every
rank), and every rank holds the kernel's `flock` on it. That ends with the process, however it ends, so a text that
nobody holds is of a run that died, and is taken over. It is a rank that counts, not the launcher: ranks may outlive it.

Where a file system has no `flock`, the text alone counts: its processes are looked for on this host. Whether those of
another host live cannot be seen, nor whether its `flock` can be seen from here: the text then has to go by hand, unless
Slurm says that it is of the same job before it was requeued.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import stat
import time
from dataclasses import asdict
from pathlib import Path

from sat_lora.errors import AdapterError, ConfigError
from sat_lora.files.foreign import MEBIBYTE, kind_of
from sat_lora.parallel.distributed import gather_lists, run_on_all_ranks
from sat_lora.printable import printable
from sat_lora.training.runs.lock_holder import Holder, Process, is_launched

LOCK = "lock"
LIMIT = 16 * MEBIBYTE
TO_DIE = 10.0  # seconds that the kernel may take to end a process that was killed
TO_STOP = 60.0  # seconds that ranks have to save after their launcher has died
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EPERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_descriptors: set[int] = set()


def _let_go_in_a_child() -> None:
    """Close the locks in a forked child: data workers write nothing and must not hold them for a rank that has died."""
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_let_go_in_a_child)


class RunLock:
    """A context in which the lock of a run folder is held. Every rank has to enter it, and to call `share`.

    folder: the run's; it is made if it is not there, and removed again if it is left empty. doing: what the lock is
    held for, in a word. option: the option that names the folder. instead: what else the user can do where the lock
    cannot be had. Entering raises ConfigError on every rank where another process holds the lock, or nothing can be
    written.
    """

    def __init__(self, folder: str | Path, *, doing: str, option: str, instead: str = "take another folder"):
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        self.doing = doing
        self.option = option
        self.instead = instead
        self.note: str | None = None
        """What was said of a lock that was taken over; None where there was none, and on every rank but 0."""
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "RunLock":
        try:
            run_on_all_ranks(lambda: self._take() if _is_first() else None)
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._let_go()

    def share(self) -> None:
        """Let every rank hold the lock, not the first alone. Raises ConfigError where another process took it
        meanwhile.
        """
        run_on_all_ranks(lambda: self._share() if _is_first() else None)  # it has the lock for itself alone until then
        run_on_all_ranks(lambda: None if _is_first() else self._share())
        processes = tuple(gather_lists([Process.current()]))
        if _is_first() and self._descriptor is not None:
            with contextlib.suppress(OSError):  # it is held all the same
                _write(self._descriptor, Holder.current(self.doing, processes))
        _end_with_launcher()

    @property
    def is_ours(self) -> bool:
        """Whether the file at its place is still the one that is held."""
        if self._descriptor is None:
            return False
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        return False

    def check(self) -> None:
        """Make sure, on rank 0 before it writes, that the folder is still this run's.

        Where the folder has been removed it is made again, and the lock with it: what was trained is not lost. Raises
        AdapterError where another process has taken the folder.
        """
        if self._descriptor is None or self.is_ours:
            return
        try:
            self._let_go()
            self._take()
        except ConfigError as error:
            raise AdapterError(f"{self.folder} was removed while it was written to; {error}") from error

    def _take(self) -> None:
        """Take the lock for this process alone. Raises ConfigError where it cannot be had."""
        try:
            self._make_folder()
            self._refuse_other_kinds()
            self._descriptor = self._open_exclusively()
            _write(self._descriptor, Holder.current(self.doing))
        except OSError as error:
            place = printable(error.filename or self.folder)
            raise ConfigError(
                f"{self.option}: {printable(self.folder)}: nothing can be written there ({place}: {error.strerror}); "
                f"change that, or {self.instead}"
            ) from error

    def _make_folder(self) -> None:
        """Make the folder and those above it that are missing, and remember which. Raises OSError where that fails."""
        missing = [self.folder]
        while not os.path.lexists(missing[-1].parent):
            missing.append(missing[-1].parent)
        for folder in reversed(missing):
            try:
                folder.mkdir()
                self._made.append(folder)
            except FileExistsError:
                if not folder.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(folder)) from None

    def _refuse_other_kinds(self) -> None:
        """Raise ConfigError where something in the folder has the name of what a run writes, and is of another kind."""
        wanted = dict.fromkeys(("adapter", "checkpoints", "watchdog"), stat.S_ISDIR)
        wanted |= dict.fromkeys(("run.json", "train.jsonl", "evaluation.json", LOCK), stat.S_ISREG)
        wrong = []
        for name, is_kind in wanted.items():
            path = self.folder / name
            with contextlib.suppress(FileNotFoundError):
                mode = path.lstat().st_mode if name == LOCK else path.stat().st_mode
                if not is_kind(mode):
                    kind = "folder" if is_kind is stat.S_ISDIR else "file"
                    wrong.append(f"{printable(path)} is {kind_of(mode)}, a run has a {kind} there")
        if wrong:
            raise ConfigError(f"{self.option}: {'; '.join(wrong)}; move it away, or {self.instead}")

    def _open_exclusively(self) -> int:
        """Return the descriptor of the lock's file, held by this process alone; where it was removed meanwhile, it is
        opened anew. Raises ConfigError where another process goes on holding it, OSError where it cannot be opened.
        """
        end = None
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                is_free = _flock(descriptor, fcntl.LOCK_EX)
                holder = Holder.read(os.pread(descriptor, LIMIT, 0))
                if is_free is not False:
                    if not self._is_at(descriptor):
                        os.close(descriptor)
                        continue
                    self._check_stale(holder, has_flock=is_free is True)
                    _descriptors.add(descriptor)
                    return descriptor
                patience, why = self._patience(holder)
                now = time.monotonic()
                if end is None:
                    end = now + patience
                    if why:
                        print(why, flush=True)
                if now >= end:
                    raise ConfigError(self._in_use(holder))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                raise
            os.close(descriptor)
            time.sleep(0.1)

    def _is_at(self, descriptor: int) -> bool:
        """Return whether the file at the lock's place is the one that is open here."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _patience(self, holder: Holder | None) -> tuple[float, str | None]:
        """Return (seconds to wait for a lock that is held to come free, what to say of that or None)."""
        if holder is None or not all(process.is_here for process in holder.processes):
            return 0.5, None
        if not holder.alive:
            return TO_DIE, None  # the last of them is being ended
        if holder.launcher is not None and not holder.launcher.lives:
            return TO_STOP, (
                f"{printable(self.folder)}: the launcher of its run has ended, ranks of it still run (process "
                f"{_numbers(holder.alive)}); waiting up to {TO_STOP:.0f} s for them to save and end"
            )
        return 0.0, None

    def _check_stale(self, holder: Holder | None, *, has_flock: bool) -> None:
        """Take over the lock of a run that has ended, and say so.

        Raises ConfigError where its text may be of a process that still runs, though nobody is seen to hold it.
        """
        if holder is None:
            return
        away = [process for process in holder.processes if not process.is_here]
        if (away and not holder.is_requeued_as_this) or (not has_flock and holder.alive):
            raise ConfigError(self._in_use(holder))
        self.note = f"{printable(self.folder)}: its lock is of a run that has ended ({holder}); taken over"
        print(self.note, flush=True)

    def _in_use(self, holder: Holder | None) -> str:
        """Return the message that the folder is in use, by whom as far as that is known, and what to do."""
        head = f"{self.option}: {printable(self.folder)} is in use"
        if holder is None:
            return f"{head} by another process; wait for its end, or {self.instead}"
        hosts = {process.host for process in holder.processes if not process.is_here}
        if hosts and not holder.alive:
            names = printable(", ".join(sorted(hosts)))
            return (
                f"{head} by a run on another machine ({holder}), as far as can be seen from here; wait for its end. If "
                f"nothing of it runs on {names} any more, remove its lock: rm {printable(self.path)}"
            )
        alive = _numbers(holder.alive)
        lives = f"process {alive} still runs" if alive else "it still runs, perhaps in another container"
        end = f" (kill {alive})" if alive else ""
        return f"{head} ({holder}): {lives}; wait for its end or end it{end}, or {self.instead}"

    def _share(self) -> None:
        """Hold the lock on this rank beside others; where the folder is another machine's own, there is no file to
        hold.

        Raises ConfigError where another process has taken it.
        """
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                _descriptors.add(self._descriptor)
            if _flock(self._descriptor, fcntl.LOCK_SH) is False:
                raise ConfigError(f"{self.option}: {printable(self.folder)} was taken by another process just now")
        except OSError:
            return

    def _let_go(self) -> None:
        """Let go of the lock, and remove its file on the last rank to do so, and the folder if it is empty.

        It raises nothing: an error here would hide the one that ended the run.
        """
        descriptor = self._descriptor
        self._descriptor = None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if self._is_at(descriptor) and _flock(descriptor, fcntl.LOCK_EX) is not False:
                    self.path.unlink()
            _descriptors.discard(descriptor)
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made = []


def _is_first() -> bool:
    """Return whether this process is rank 0."""
    import torch

    return torch.distributed.get_rank() == 0


def _write(descriptor: int, holder: Holder) -> None:
    """Write the holder into the file of a lock, in place of what is there. Raises OSError where that fails."""
    content = (json.dumps(asdict(holder)) + "\n").encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    os.fsync(descriptor)


def _flock(descriptor: int, how: int) -> bool | None:
    """Return whether the kernel gave the lock at once; None where the file system knows no such locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in NO_FLOCK:
            return None
        raise
    return True


def _numbers(processes: list[Process]) -> str:
    """Return the numbers of processes, as `kill` takes them."""
    return " ".join(str(process.pid) for process in processes)


def _end_with_launcher() -> None:
    """Let the kernel send SIGTERM when the launcher dies that has started this rank, and would have ended it."""
    if is_launched():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
