"""The bootstrap against one that draws sample by sample."""

import random

import numpy as np
import pytest

from sat_lora.training.metrics import scores as scores_module
from sat_lora.training.metrics.captions import perplexity
from sat_lora.training.metrics.scores import Answered, interval_of, mean_scores


def drawn_plainly(samples, resamples, seed):
    generator = random.Random(seed)
    means = sorted(sum(generator.choices(samples, k=len(samples))) / len(samples) for _ in range(resamples))
    return np.quantile(means, [0.025, 0.975])


def test_the_interval_is_that_of_plain_draws():
    samples = [0.0] * 30 + [1.0] * 70
    low, high = interval_of(mean_scores(samples), resamples=4000)
    plain = drawn_plainly(samples, 4000, 7)
    assert low == pytest.approx(plain[0], abs=0.011) and high == pytest.approx(plain[1], abs=0.011)
    assert low < 0.7 < high
    # The textbook's normal approximation: 1.96 sqrt(p (1 - p) / n).
    assert high - low == pytest.approx(2 * 1.96 * (0.21 / 100) ** 0.5, rel=0.1)


def test_it_is_the_same_every_time_however_it_is_cut(monkeypatch):
    scores = mean_scores([n % 7 / 6 for n in range(50)])
    first = interval_of(scores)
    monkeypatch.setattr(scores_module, "_AT_ONCE", 50 * 13)
    assert interval_of(scores) == first == interval_of(scores)
    assert interval_of(scores, seed=1) != first


def test_what_never_varies_has_no_width():
    assert interval_of(mean_scores([0.25] * 9)) == (0.25, 0.25)
    assert interval_of(mean_scores([1.0])) == (1, 1)


def test_perplexity_is_of_all_tokens_and_not_the_mean_of_samples():
    answered = Answered(["", ""], [["x"], ["y"]], [(np.log(2) * 1, 1), (np.log(8) * 9, 9)])
    measured = perplexity(answered)
    assert measured.samples == pytest.approx([2, 8])
    assert measured.value == pytest.approx((2 * 8**9) ** (1 / 10))
    low, high = interval_of(measured)
    assert 2 <= low <= measured.value <= high <= 8 + 1e-9
