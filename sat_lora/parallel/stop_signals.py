"""SIGTERM, SIGINT and SIGHUP as a wish to stop after the step, so that a machine that is taken away loses nothing."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], Any] | int | None
"""What `signal.signal` takes and gives."""


class Ending(Protocol):
    """An event of any kind: of threads, of processes."""

    def is_set(self) -> bool:
        """Return whether the event has come."""
        ...


class Stopped(Exception):
    """A run was asked to stop, has saved after `step` steps, and can be resumed. No mistake, so no SatLoraError."""

    def __init__(self, number: signal.Signals, step: int):
        super().__init__(f"stopped by {number.name} after step {step}")
        self.step = step
        # As a shell has it: whatever was to come after the run does not, and a scheduler sees that it was heeded.
        self.status = 128 + number


class StopSignals:
    """A context, for the main thread alone, in which signals that arrive are counted instead of died of.

    SIGHUP stays ignored where `nohup` has said so.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(SIGNALS, 0)
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "StopSignals":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heeded = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._count) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and issubclass(kind, Stopped):
            return  # launchers repeat themselves, and the process is about to end as it was told
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            for number in [number for number, count in self.counts.items() if count]:
                signal.raise_signal(number)  # it came too late for any step

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.counts[signal.Signals(number)] += 1
        if number == signal.SIGHUP:
            _leave_lost_terminal()


def serve_until(ending: Ending) -> None:
    """Let a data worker serve until its rank has saved: Ctrl-C, a lost terminal and launchers signal it too.

    ending: an event that is set when the rank's interpreter ends, which then sends SIGTERM to the workers it has left,
    and waits for them.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if ending.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)


def _leave_lost_terminal() -> None:
    """Let what writes to a terminal that is gone write nowhere from now on: nothing that is printed may fail for it."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
