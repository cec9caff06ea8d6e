"""Regular expressions that others wrote, matched within a time: one that repeats what is repeated, as `(a+)+` does, may
try more ways than a life has seconds, and Python's own matching does not give up.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sat_lora.errors import ConfigError
from sat_lora.printable import printable

LIMIT = 2.0  # seconds of this process that a pattern may take over all the names that it is tried on
NOTED = 0.001  # seconds; a match that takes less does not count
LONGEST = 100_000  # characters
_REPEATS = re.compile(r"[*+{]")
_spent: dict[str, float] = {}
"""Seconds that the slow ones have taken so far."""


class _TooSlow(BaseException):
    """A match is given up in its middle: a BaseException, so that no `except Exception` on the way takes it."""


def pattern_problem(pattern: str) -> str | None:
    """Return why a text is no regular expression, as the end of a sentence; None if it is one."""
    if len(pattern) > LONGEST:
        return f"has {len(pattern)} characters, wanted {LONGEST} at most"
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        return f"is not a regular expression: {printable(error)}"
    return None


def shortened(pattern: object) -> str:
    """Return a pattern as an error shows it, of bounded length."""
    text = printable(repr(pattern))
    return text if len(text) <= 100 else f"{text[:100]} ..."


def matches(pattern: str, name: str) -> bool:
    """Return whether the whole of `name` matches the pattern.

    Raises re.error for what is no pattern, and ConfigError if it cannot be told within LIMIT. In another thread than
    the main one, whose matching nothing interrupts, it is waited for.
    """
    if not _REPEATS.search(pattern):
        return re.fullmatch(pattern, name) is not None
    spent = _spent.get(pattern, 0.0)
    try:
        with _interrupted_after(LIMIT - spent) as seconds:
            is_match = re.fullmatch(pattern, name) is not None
        if seconds[0] > NOTED:
            _spent[pattern] = spent + seconds[0]
        return is_match
    except _TooSlow:
        _spent[pattern] = LIMIT
        raise ConfigError(
            f"the pattern {shortened(pattern)} takes more than {LIMIT:g} s to match, as one does that repeats what is "
            "repeated already; write it without that, or name the layers"
        ) from None


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[list[float]]:
    """Raise _TooSlow inside after so many seconds of the process's own time; the list then holds what it took."""
    if seconds <= 0:
        raise _TooSlow
    if threading.current_thread() is not threading.main_thread():
        yield [0.0]
        return
    spent: list[float] = []
    is_armed = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_armed:
            raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield spent
    finally:
        is_armed = False
        spent.append(seconds - signal.setitimer(signal.ITIMER_VIRTUAL, 0)[0])
        signal.signal(signal.SIGVTALRM, before)
