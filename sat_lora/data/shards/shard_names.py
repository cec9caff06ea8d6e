"""The names of tar shards: braces that stand for many of them, counted before any is made."""

import re
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

from sat_lora.errors import DataError
from sat_lora.printable import printable

MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def expand_shards(paths: Sequence[str | Path]) -> list[str]:
    """Return the shards of data paths, `{000..127}` and `{a,b}` expanded, each once.

    Raises DataError for unbalanced braces, or if they are more than MOST_SHARDS.
    """
    shards = []
    for path in map(str, paths):
        shown = printable(path[:200])
        try:
            count = _count_of(path)
            if count > MOST_SHARDS:
                raise DataError(f"{shown}: means {_number(count)} shards, more than {MOST_SHARDS:,}; mend the range")
            shards += expand_urls(path)
        except (ValueError, RecursionError) as error:
            problem = "braces within braces without end" if isinstance(error, RecursionError) else error
            raise DataError(f"{shown}: {printable(problem)}; write shards as 'shards-{{000..127}}.tar'") from error
    return list(dict.fromkeys(shards))


def _number(count: int) -> str:
    return f"{count:,}" if count < 10**15 else "more than 10^15"


def _count_of(pattern: str) -> int:
    """Return how many names braces come to; none of them is made for it.

    Raises ValueError if a range has thousands of digits.
    """
    total = 1
    depth = 0
    start = 0
    place = 0
    while place < len(pattern):
        if pattern[place] == "\\":
            place += 1
        elif pattern[place] == "{":
            depth += 1
            start = place + 1 if depth == 1 else start
        elif pattern[place] == "}":
            depth -= 1
            total *= _count_of_group(pattern[start:place]) if depth == 0 else 1
        place += 1
    return total


def _count_of_group(group: str) -> int:
    if match := _RANGE.fullmatch(group):
        first, last, step = (int(number or 1) for number in match.groups())
        return abs(last - first) // max(1, abs(step)) + 1
    parts = [""]
    depth = 0
    for character in group:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return sum(map(_count_of, parts))
