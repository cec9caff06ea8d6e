"""Several data sets in one stream, each with its share of it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from sat_lora.data.batches.sampler import EpochSampler
from sat_lora.errors import DataError

BLOCK = 1000  # samples of the stream, of which each data set has its share exactly, rounded


@dataclass(frozen=True)
class Part:
    """A stretch of the items: how many they are, and their weight beside those of other parts."""

    samples: int
    weight: float


class MixtureSampler(EpochSampler):
    """Yields this rank's index batches, without end, from `start_step` on, of stretches of the data by their weights.

    The stream of EpochSampler, but that each BLOCK of it has a share of each part, in an order drawn from (seed,
    block); the samples of a part come permutation after permutation, each drawn from (seed, part, epoch of the part).
    So a step is a pure function of seed and step here as well, whatever was drawn before.
    parts: in the order of their items.
    """

    repeats = True
    """Samples of one part may come again before another's have all come."""

    def __init__(self, parts: Sequence[Part], **settings):
        super().__init__(sum(part.samples for part in parts), **settings)
        if any(part.samples < 1 for part in parts):
            raise DataError("a part of the mixture has no samples to train on")
        self.parts = list(parts)
        self.quotas = quotas([part.weight for part in parts])
        self.firsts = [0, *itertools.accumulate(part.samples for part in parts)]
        self._block: int | None = None
        self._part_of: Sequence[int] = ()
        self._number_of: Sequence[int] = ()
        self._orders: dict[int, tuple[int, Sequence[int]]] = {}

    def _sample_at(self, place: int) -> int:
        block, index = divmod(place, BLOCK)
        if block != self._block:
            self._lay_out(block)
        part = int(self._part_of[index])
        epoch, number = divmod(block * self.quotas[part] + int(self._number_of[index]), self.parts[part].samples)
        return self.firsts[part] + self._in_epoch(part, epoch, number)

    def _lay_out(self, block: int) -> None:
        """Draw which part each place of a block is of, and count the places of each."""
        parts = numpy.repeat(numpy.arange(len(self.quotas)), self.quotas)
        if self.shuffle:
            parts = numpy.random.default_rng([self.seed, block]).permutation(parts)
        numbers = numpy.empty(BLOCK, dtype=numpy.int64)
        for part, quota in enumerate(self.quotas):
            numbers[parts == part] = numpy.arange(quota)
        self._block = block
        self._part_of = parts
        self._number_of = numbers

    def _in_epoch(self, part: int, epoch: int, number: int) -> int:
        if not self.shuffle:
            return number
        if self._orders.get(part, (None,))[0] != epoch:
            generator = numpy.random.default_rng([self.seed, part, epoch])
            self._orders[part] = epoch, generator.permutation(self.parts[part].samples)
        return int(self._orders[part][1][number])


def quotas(weights: Sequence[float]) -> list[int]:
    """Return how many samples of a BLOCK are of each weight: its share, rounded so that all fill it; 1 at least."""
    shares = [weight / sum(weights) * BLOCK for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda place: (counts[place] - shares[place], place))
    for place in itertools.islice(itertools.cycle(by_rest), max(0, BLOCK - sum(counts))):
        counts[place] += 1
    while sum(counts) > BLOCK:
        counts[max(range(len(counts)), key=lambda place: (counts[place], -place))] -= 1
    return counts
