"""What all ranks of a run have to have alike: values as marks, and what to say where they differ.

Ranks that were started with different options compute different things or wait for each other for ever, and neither
names the option.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import sat_lora
from sat_lora.errors import ConfigError
from sat_lora.printable import printable

SHOWN = 120  # characters of a value


def mark(value: object) -> str:
    """Return a value as text of bounded length that differs where the value does."""
    text = printable(json.dumps(value, sort_keys=True, default=str))
    if len(text) <= SHOWN:
        return text
    return f"{text[:SHOWN]}... (digest {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def differences(marks: Mapping[str, str], first: Mapping[str, str]) -> dict[str, str]:
    """Return what is not as on rank 0: this rank's marks by name, "missing" where it has none."""
    return {name: marks.get(name, "missing") for name in [*first, *marks] if marks.get(name) != first.get(name)}


def disagreement(first: Mapping[str, str], by_rank: Mapping[int, Mapping[str, str]]) -> ConfigError:
    """Return the error that every rank gets.

    first: the marks of rank 0. by_rank: the differences of the other ranks.
    """
    problems = []
    for name in dict.fromkeys(name for marks in by_rank.values() for name in marks):
        ranks: dict[str, list[int]] = {}
        for rank, marks in sorted(by_rank.items()):
            if name in marks:
                ranks.setdefault(marks[name], []).append(rank)
        values = [f"{first.get(name, 'missing')} on rank 0", *(f"{v} on {_ranks(r)}" for v, r in ranks.items())]
        problems.append(f"{name}: {', '.join(values)}")
    intro = "the ranks were not started alike, and would compute different things or wait for each other for ever"
    return ConfigError(
        f"{intro}:\n" + "\n".join(f"- {problem}" for problem in problems) + "\ngive every rank the same options, data, "
        "packages and code"
    )


def _ranks(ranks: Sequence[int], most: int = 8) -> str:
    listed = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
    return f"rank{'s' * (len(ranks) > 1)} {listed}"


def code_mark(folder: str | Path | None = None) -> str:
    """Return a short mark of this package's source, which differs where a checkout is older or edited."""
    value = 0
    folder = Path(folder or Path(sat_lora.__file__).parent)
    for path in sorted(folder.rglob("*.py")):
        value = zlib.crc32(path.relative_to(folder).as_posix().encode() + path.read_bytes(), value)
    return f"{value:08x}"
