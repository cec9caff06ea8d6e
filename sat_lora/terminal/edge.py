"""The edge between a command and whoever started it: a mistake and Ctrl-C are one line and a status, never a traceback.

It imports nothing heavy, so that it stands before all that takes seconds to import.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
MISTAKE = 2
TO_SPEAK = 10.0  # seconds that rank 0 may be later than others
GRACE = 5.0  # seconds in which a command that was stopped may clean up; a call that never comes back takes longer
_current: "CtrlC | None" = None


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is rank 0, by the RANK that `deepspeed` and `torchrun` set; known before any process group.

    A RANK that is no number is an error that somebody has to say.
    """
    rank = environ.get("RANK", "").strip()
    return not rank.isdecimal() or int(rank[:9]) == 0


def let_first_rank_speak(environ: Mapping[str, str] = os.environ) -> None:
    """Wait, before another rank than the first ends with a mistake that all have, until that one has said it.

    Launchers end all ranks as soon as one has ended: here the first one's end, after it has spoken, ends this wait.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in environ or "CROSS_RANK" in environ
    if is_launched and not is_first_rank(environ):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        time.sleep(TO_SPEAK)


class CtrlC:
    """A context in which Ctrl-C ends the process with INTERRUPTED and a line of `name` on rank 0.

    At first it does so by a KeyboardInterrupt, so that locks and half-written folders go; at once while something is
    imported, where libraries survive an exception badly, at a second Ctrl-C, and after GRACE seconds. What is entered
    within another one, or outside of the main thread, does nothing.
    """

    def __init__(self, name: str):
        self.name = name
        self.pid = os.getpid()
        self.count = 0
        self.has_spoken = False
        self._left = threading.Event()
        self._before: Callable[[int, FrameType | None], Any] | int | None = None
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "CtrlC":
        global _current
        if _current is None and threading.current_thread() is threading.main_thread():
            _current = self
            self._before = signal.signal(signal.SIGINT, self._heard)
            pipe = os.pipe()
            self._pipe = pipe
            os.set_blocking(pipe[1], False)
            # The system's handler writes there even while the main thread is in a call that never comes back.
            signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._force, args=pipe, name="sat_lora ctrl-c", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        global _current
        if _current is self and self._pipe is not None:
            _current = None
            self._left.set()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, self._before)
            os.write(self._pipe[1], b"\0")  # the thread ends, and closes both

    def say(self) -> None:
        """Write the line about Ctrl-C on rank 0, once."""
        if self.has_spoken:
            return
        self.has_spoken = True
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # closed, or in the middle of printing
            sys.stdout.flush()
        if is_first_rank():
            start = "\n" if os.isatty(2) else ""
            _write(f"{start}{self.name}: stopped by Ctrl-C\n")

    def _heard(self, number: int, frame) -> None:
        if os.getpid() != self.pid:
            os._exit(INTERRUPTED)  # a worker that was forked: its parent speaks
        self.count += 1
        if self.count > 1 or _is_importing(frame):
            self.say()
            _end_now()
        raise KeyboardInterrupt

    def _force(self, reader: int, writer: int) -> None:
        while (byte := os.read(reader, 1)) != b"\0":
            is_ours = byte == bytes([signal.SIGINT]) and signal.getsignal(signal.SIGINT) == self._heard
            if is_ours and not self._left.wait(GRACE):
                self.say()
                _end_now()
        os.close(reader)
        os.close(writer)


def run_command(name: str, action: Callable[[], int | None], *, may_be_cut: bool = False) -> int:
    """Return the status of `action()`: its own, INTERRUPTED after Ctrl-C, MISTAKE after a mistake of the user.

    Such a mistake is a SatLoraError, or an OSError that names a file. Both are said as `name: error: ...`, by rank 0
    alone where every rank has it. may_be_cut: whoever reads the output may have heard enough, as `head` does: 0.
    """
    from sat_lora.errors import SatLoraError
    from sat_lora.files.foreign import os_problem
    from sat_lora.printable import printable_lines

    with CtrlC(name) as ctrl_c:
        try:
            status = action() or 0
            if sys.stdout is not None:  # of a process that was started without one
                sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            (_current or ctrl_c).say()
            return INTERRUPTED
        except SatLoraError as error:
            if is_first_rank():
                print(f"{name}: error: {printable_lines(error)}", file=sys.stderr, flush=True)
            let_first_rank_speak()
        except BrokenPipeError:
            if not may_be_cut:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            return 0
        except OSError as error:
            if error.filename is None:
                raise
            rank = "" if is_first_rank() else f"rank {os.environ['RANK']}: "
            print(f"{name}: error: {rank}{os_problem(error)}", file=sys.stderr, flush=True)
        return MISTAKE


class LastingStream:
    """A text stream whose reader may go, or whose disk may be full: what is written from then on goes nowhere.

    `error` is the OSError that came; None while all is well.
    """

    def __init__(self, stream):
        self._stream = stream
        self.error = None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text and return how many characters were taken, which is all of them."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        """Write what the stream still holds."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        self.error = self.error or error
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is still in its buffer goes there too
            os.close(nowhere)


def make_streams_last() -> None:
    """Let stdin, stdout and stderr be there and take every character, whatever the process was started with.

    A number that is closed would be given to the next file that is opened, and what a library prints would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
        if number:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a terminal of another alphabet shows a foreign name
            setattr(sys, name, LastingStream(stream))


def _lost_output(name: str) -> str | None:
    """Return the sentence for a stdout that could not be written to, if somebody wanted to read it; else None."""
    error = getattr(sys.stdout, "error", None)
    if error is None or error.errno in (errno.EPIPE, errno.EIO):  # as `head` leaves, and a terminal that is closed
        return None
    return f"{name}: what it printed could not all be written: {error.strerror}"


def run_script(name: str, main: Callable[[], int | None], *, prints_its_result: bool = False) -> NoReturn:
    """End the process with the status of `main()`. Ctrl-C is a line from here to the very end.

    prints_its_result: what could not be printed is then a mistake.
    """
    make_streams_last()
    ctrl_c = CtrlC(name)
    ctrl_c.__enter__()
    try:
        status: str | int = main() or 0
    except KeyboardInterrupt:
        ctrl_c.say()
        status = INTERRUPTED
    except SystemExit as stop:  # of the parser of options
        status = stop.code or 0
    sys.stdout.flush()
    lost = _lost_output(name)
    if lost:
        print(lost, file=sys.stderr, flush=True)
        status = status or MISTAKE * prints_its_result
    was_interrupted = ctrl_c.count > 0
    ctrl_c.count = 1  # from now on there is nothing to unwind
    if was_interrupted and status == INTERRUPTED:
        _end_now()  # everything is unwound; what the interpreter would wait for at its end may never come
    sys.exit(status)


def _end_now() -> NoReturn:
    """End the process as interrupted, and its workers before it: one that was being forked has not heard of Ctrl-C."""
    processes = sys.modules.get("multiprocessing")
    with contextlib.suppress(Exception):  # on whatever the main thread is at
        for worker in processes.active_children() if processes else ():
            worker.kill()
    with contextlib.suppress(OSError):  # no /proc: where the system is another one
        for pid in _forked_copies():
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _forked_copies() -> list[int]:
    """Return the process ids of this process's children that were forked and run no program of their own.

    Those that multiprocessing has forked and not yet noted are among them.
    """
    ours = _read("/proc/self/cmdline")
    pids = [
        int(pid) for task in os.listdir("/proc/self/task") for pid in _read(f"/proc/self/task/{task}/children").split()
    ]
    return [pid for pid in pids if _read(f"/proc/{pid}/cmdline") == ours]


def _read(path: str) -> bytes:
    """Return what a file of /proc says; nothing where it is gone."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def _is_importing(frame) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
