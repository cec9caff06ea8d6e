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
    """Return a decorator that marks a check with the codes that it gives, so that those looked for can be counted.

    Raises ValueError if there is no such code.
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
    """Return the codes that the checks of this process have looked for. anew: forget them afterwards."""
    codes = set(_looked_for)
    if anew:
        _looked_for.clear()
    return codes


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or may be. What it means and what helps stands in `codes.CODES[code]`.

    Raises ValueError if there is no such code.
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
        """How bad it is, one of `codes.LEVELS`."""
        return CODES[self.code].level

    @property
    def where(self) -> str:
        """The ranks, parameter, module, file and option that it is about, as one line; "" without any."""
        ranks = ", ".join(map(str, self.ranks))
        places = [f"rank{'s' if len(self.ranks) > 1 else ''} {ranks}" if self.ranks else ""]
        places += [f"{name} {value}" for name in ("parameter", "module", "file") if (value := getattr(self, name))]
        return ", ".join([*filter(None, places), *([self.option] if self.option else [])])

    def __str__(self) -> str:
        """Return the paragraph that `as_text` shows of it."""
        return _block(self)


def joined(by_rank: Iterable[Sequence[Finding]]) -> list[Finding]:
    """Return the findings of all ranks, worst first; those that several ranks share come once, with all their ranks.

    A finding that names no rank gets that of the sequence it comes in.
    """
    ranks_of: dict[Finding, set[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            without_ranks = dataclasses.replace(finding, ranks=())
            ranks_of.setdefault(without_ranks, set()).update(finding.ranks or (rank,))
    merged = [dataclasses.replace(finding, ranks=tuple(sorted(ranks))) for finding, ranks in ranks_of.items()]
    return sorted(merged, key=_badness)


def as_text(findings: Sequence[Finding], checks: int | None = None) -> str:
    """Return all findings as paragraphs, worst first, and a last line that counts them.

    checks: how many codes were looked for, None if that is not known.
    """
    blocks = [_block(finding) for finding in sorted(findings, key=_badness)]
    return "\n\n".join([*blocks, summary(findings, checks)])


def summary(findings: Sequence[Finding], checks: int | None = None) -> str:
    """Return the line that counts the findings, by level. checks: as for `as_text`."""
    counts = [(level, sum(finding.level == level for finding in findings)) for level in LEVELS]
    levels = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count]
    all_checks = "" if checks is None else f", {checks} checks"
    return f"doctor: {', '.join(levels) or 'no problem found'}{all_checks}"


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as a JSON array of objects: the fields of each, with its level and why it matters."""
    entries = [
        {"level": finding.level, **dataclasses.asdict(finding), "why": CODES[finding.code].why} for finding in findings
    ]
    return json.dumps(entries, indent=2)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Return whether one of the findings is an error."""
    return any(finding.level == ERROR for finding in findings)


def _badness(finding: Finding) -> int:
    """Return 0 for an error, more for what is less bad: sorts the worst to the front."""
    return LEVELS.index(finding.level)


def _block(finding: Finding) -> str:
    code = CODES[finding.code]
    lines = [("seen", finding.seen), ("where", finding.where), ("why", code.why), ("do", finding.fix or code.fix)]
    shown = [f"  {label:<6}{printable_lines(text)}".replace("\n", "\n        ") for label, text in lines if text]
    return "\n".join([f"{code.level}: {finding.code}", *shown, f"  more  docs/doctor.md#{finding.code}"])
