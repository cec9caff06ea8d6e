"""How far a command is: a bar on a terminal, a line now and then in a log file. Imports nothing heavy."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 10.0
Item = TypeVar("Item")
Progress = Callable[[Collection[Item]], Iterable[Item]]
"""Goes through a collection and shows how far that is, as `shown` does and tqdm."""


def shown(items: Collection[Item], what: str, unit: str) -> Iterator[Item]:
    """Yield each of `items` and show on stderr how far that is, if it takes more than a second.

    In a log file there is a line every ten seconds, and a last one if there was any. A stderr that cannot be written to
    is passed over.
    """
    if is_terminal(sys.stderr):
        from tqdm import tqdm

        yield from tqdm(items, desc=what, unit=f" {unit}", delay=1, ncols=terminal_columns())
        return
    total = len(items)
    began = time.monotonic()
    last_line = began
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            remaining = (total - count) * (now - began) / max(1, count)
            _say(f"{what}: {count} of {total} {unit}, {as_time(remaining) if count else '?'} left")
        yield item
    if last_line > began:
        _say(f"{what}: {total} of {total} {unit}, {as_time(time.monotonic() - began)}")


def as_time(seconds: float) -> str:
    """Return the seconds as text: 03:07, or 1:03:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def is_terminal(stream) -> bool:
    """Return whether a stream is a terminal; False for one that is closed or not there."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def terminal_columns(default: int = 120) -> int:
    """Return the columns of the terminal behind stderr; `default` if it tells no size, as in many containers."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or default
    except (AttributeError, OSError, ValueError):
        return default


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
