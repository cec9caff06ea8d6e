"""Samples that a run cannot use, and how many are too many."""

import math
from dataclasses import dataclass, field

from sat_lora.errors import DataError

FEWEST = 100  # samples to have seen before a share of them says something
DEVIATIONS = 3.0
SHOWN = 20


@dataclass
class BrokenSamples:
    """What was found broken so far: the same on every rank, where each is given what all of them found."""

    dataset_size: int
    max_share: float
    reasons: dict[str, str] = field(default_factory=dict)

    def new_in(self, batches: list[dict]) -> list[tuple[str, str]]:
        """The (path, reason) of collated batches that are not known yet."""
        return [entry for batch in batches for entry in batch["broken"] if entry[0] not in self.reasons]

    def add(self, broken: list[tuple[str, str]]) -> None:
        self.reasons |= dict(broken)

    def check(self, seen: int) -> None:
        """DataError, with the list, when more than `max_share` is broken; `seen` samples were drawn up to now.

        Within the first epoch the samples seen are a draw without replacement from the data set: their broken share
        has to exceed the allowed one by three standard deviations of such a draw. At its end that margin is zero.
        """
        seen = min(seen, self.dataset_size)
        if seen < min(FEWEST, self.dataset_size):
            return
        allowed = self.max_share * seen
        margin = DEVIATIONS * math.sqrt(allowed * (1 - self.max_share) * (1 - seen / self.dataset_size))
        if len(self.reasons) <= allowed + margin:
            return
        reasons = sorted(self.reasons.values())
        shown = "\n  ".join(reasons[:SHOWN]) + ("\n  ..." if len(reasons) > SHOWN else "")
        raise DataError(
            f"{len(reasons)} of the first {seen} training samples cannot be used, --max-broken-share allows a share of "
            f"{self.max_share:g}; mend them, take them out, or raise the option. The run's train.jsonl names all:\n"
            f"  {shown}"
        )
