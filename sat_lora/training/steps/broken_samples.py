"""Samples that a run cannot use, and how many are too many."""

import math
from collections import Counter
from dataclasses import dataclass, field

from sat_lora.errors import DataError

FEWEST = 100  # samples to have seen before a share of them says something
DEVIATIONS = 3.0
SHOWN = 20


def broken_in(batches: list[dict]) -> list[tuple[str, str, str]]:
    """Return the (path, reason, sample) of each sample that collated batches had to leave out. Where a batch does not
    tell samples of one path apart, the sample is the path.
    """
    entries = []
    for batch in batches:
        samples = batch.get("broken_samples", [path for path, _ in batch["broken"]])
        entries += [(path, reason, sample) for (path, reason), sample in zip(batch["broken"], samples, strict=True)]
    return entries


@dataclass
class BrokenSamples:
    """The samples found broken so far. They are the same on every rank, if each adds what all ranks have found.

    dataset_size: samples of the data set. max_share: the share of them that may be broken.
    """

    dataset_size: int
    max_share: float
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    """Reasons by (path, sample): every question about an image that cannot be read is a broken sample."""

    def new_in(self, batches: list[dict]) -> list[tuple[str, str, str]]:
        """Return the (path, reason, sample) of collated batches that are not known yet."""
        return [entry for entry in broken_in(batches) if (entry[0], entry[2]) not in self.reasons]

    def add(self, broken: list[tuple[str, str, str]]) -> None:
        """Remember broken samples, each as (path, reason, sample)."""
        self.reasons |= {(path, sample): reason for path, reason, sample in broken}

    def check(self, seen: int, *, is_last: bool = False) -> None:
        """Raise DataError, with the list, where more than `max_share` is broken of the `seen` samples drawn up to now.

        Within the first epoch the samples seen are a draw without replacement from the data set: their broken share
        has to exceed the allowed one by three standard deviations of such a draw. At its end that margin is zero.
        is_last: the whole run drew no more than these; if all of them are broken, that is too many, however few.
        """
        seen = min(seen, self.dataset_size)
        has_used_none = is_last and len(self.reasons) >= seen > 0
        if seen < min(FEWEST, self.dataset_size) and not has_used_none:
            return
        allowed = self.max_share * seen
        margin = DEVIATIONS * math.sqrt(allowed * (1 - self.max_share) * (1 - seen / self.dataset_size))
        if len(self.reasons) <= allowed + margin * (not has_used_none):
            return
        reasons = [
            reason if count == 1 else f"{reason} ({count} samples)"
            for reason, count in sorted(Counter(self.reasons.values()).items())
        ]
        shown = "\n  ".join(reasons[:SHOWN]) + ("\n  ..." if len(reasons) > SHOWN else "")
        raise DataError(
            f"{len(self.reasons)} of the first {seen} training samples cannot be used, --max-broken-share allows a "
            f"share of {self.max_share:g}; mend them, take them out, or raise the option. The run's train.jsonl names "
            "all:\n"
            f"  {shown}"
        )
