"""What a metric of generated answers is given and gives back, and intervals of confidence for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
SEED = 1234
_AT_ONCE = 4_000_000  # counts that are held at a time


@dataclass(frozen=True)
class Answered:
    """Answers that were generated, beside the right ones."""

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    """The right answers of each sample, one or more."""
    answer_losses: Sequence[tuple[float, int]] = ()
    """The cross-entropy summed over the tokens of each right answer, and how many these are; empty where it was not
    measured.
    """


@dataclass(frozen=True)
class Scores:
    """A metric of all samples: what each one has, and what their sums come to."""

    samples: Sequence[float]
    """The score of each sample, for those who look at it."""
    statistics: np.ndarray
    """What is summed over samples: float64 (samples, kinds)."""
    of_sums: Callable[[np.ndarray], float]
    """Returns the metric of sums (kinds,)."""

    @property
    def value(self) -> float:
        """The metric of all samples."""
        return self.of_sums(self.statistics.sum(axis=0))


Measure = Callable[[Answered], Scores]


def mean_of(score: Callable[[str, Sequence[str]], float]) -> Measure:
    """Return the metric that is the mean of `score(prediction, references)` over samples."""

    def measure(answered: Answered) -> Scores:
        return mean_scores([float(score(*pair)) for pair in zip(answered.predictions, answered.references)])

    return measure


def best_of(score: Callable[[str, str], float]) -> Measure:
    """Return the mean over samples of the best `score(prediction, reference)` of their references."""
    return mean_of(lambda prediction, references: max(score(prediction, reference) for reference in references))


def mean_scores(samples: Sequence[float]) -> Scores:
    """Return the scores whose metric is their mean."""
    statistics = np.array([(score, 1.0) for score in samples], dtype=np.float64).reshape(-1, 2)
    return Scores(samples, statistics, lambda sums: float(sums[0] / sums[1]))


def interval_of(scores: Scores, *, resamples: int = RESAMPLES, seed: int = SEED) -> tuple[float, float]:
    """Return (low, high) of the metric by the percentile bootstrap: LEVEL of the values that it has on as many samples,
    drawn from these with replacement, lie between the two (Efron 1979).

    The draws depend on the number of samples and the seed alone, so that metrics and models are drawn alike.
    """
    count = len(scores.statistics)
    generator = np.random.default_rng(seed)
    values: list[float] = []
    chunk = max(1, _AT_ONCE // count)
    for start in range(0, resamples, chunk):
        draws = generator.multinomial(count, np.full(count, 1 / count), size=min(chunk, resamples - start))
        values += [scores.of_sums(sums) for sums in draws.astype(np.float64) @ scores.statistics]
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(np.array(values), [outside, 1 - outside])
    return float(low), float(high)
