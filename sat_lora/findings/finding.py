"""What a check has found, told in one form whoever asks: the command, a program, a file."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sat_lora.findings.codes import CODES, ERROR, LEVELS
from sat_lora.printable import printable_lines

_looked_for: set[str] = set()


def looks_for(*codes: str) -> Callable[[Callable], Callable]:
    """Marks a check with the codes that it gives, so that those which were looked for can be counted.

    ValueError: a code that is not there.
    """
    if not CODES.keys() >= {*codes}:
        raise ValueError(f"there are no codes {sorted({*codes} - CODES.keys())}")

    def mark(check: Callable) -> Callable:
        @functools.wraps(check)
        def counted(*args, **kwargs):
            findings = check(*args, **kwargs)
            _looked_for.update(codes)
            return findings

        return counted

    return mark


def looked_for(*, anew: bool = False) -> set[str]:
    """The codes that the checks of this process have looked for. anew: forget them afterwards."""
    codes = set(_looked_for)
    if anew:
        _looked_for.clear()
    return codes


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or may be. What it means and what helps stands in `codes.CODES[code]`.

    ValueError: a code that is not there.
    """

    code: str
    seen: str
    """What was looked at and what it was, with figures."""
    ranks: tuple[int, ...] = ()
    parameter: str | None = None
    module: str | None = None
    file: str | None = None
    option: str | None = None
    fix: str | None = None
    """What to do here, if more can be said than the code says."""

    def __post_init__(self):
        if self.code not in CODES:
            raise ValueError(f"there is no code {self.code!r}")

    @property
    def level(self) -> str:
        return CODES[self.code].level

    @property
    def where(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        places = [f"rank{'s' if len(self.ranks) > 1 else ''} {ranks}" if self.ranks else ""]
        places += [f"{name} {value}" for name in ("parameter", "module", "file") if (value := getattr(self, name))]
        return ", ".join([*filter(None, places), *([self.option] if self.option else [])])


def joined(by_rank: Iterable[Sequence[Finding]]) -> list[Finding]:
    """The findings of all ranks, in rank order; those that several ranks share come once, with the ranks of all.

    A finding that names no rank gets that of the sequence it comes in.
    """
    together: dict[Finding, set[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            same = dataclasses.replace(finding, ranks=())
            together.setdefault(same, set()).update(finding.ranks or (rank,))
    found = [dataclasses.replace(one, ranks=tuple(sorted(ranks))) for one, ranks in together.items()]
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def as_text(findings: Sequence[Finding], checks: int | None = None) -> str:
    """All of them, worst first, and a last line that counts them. checks: how many there were, None if not known."""
    blocks = [_block(finding) for finding in sorted(findings, key=lambda one: LEVELS.index(one.level))]
    return "\n\n".join([*blocks, summary(findings, checks)])


def summary(findings: Sequence[Finding], checks: int | None = None) -> str:
    """In one line."""
    counts = [(level, sum(one.level == level for one in findings)) for level in LEVELS]
    words = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count]
    count = "" if checks is None else f", {checks} checks"
    return f"doctor: {', '.join(words) or 'no problem found'}{count}"


def as_json(findings: Sequence[Finding]) -> str:
    entries = [{"level": one.level, **dataclasses.asdict(one), "why": CODES[one.code].why} for one in findings]
    return json.dumps(entries, indent=2)


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.level == ERROR for finding in findings)


def _block(finding: Finding) -> str:
    code = CODES[finding.code]
    lines = [("seen", finding.seen), ("where", finding.where), ("why", code.why), ("do", finding.fix or code.fix)]
    shown = [f"  {label:<6}{printable_lines(text)}".replace("\n", "\n        ") for label, text in lines if text]
    return "\n".join([f"{code.level}: {finding.code}", *shown, f"  more  docs/doctor.md#{finding.code}"])
