"""How many broken samples stop a run."""

import numpy
import pytest

from sat_lora import DataError
from sat_lora.training.steps.broken_samples import BrokenSamples


def stops_at(flags, max_share: float, batch: int = 8) -> int | None:
    """How many samples of `flags` (True: broken) are seen when the run stops; None if it does not."""
    known = BrokenSamples(len(flags), max_share)
    for start in range(0, len(flags), batch):
        broken = [(f"{i}.png", f"{i}.png: bad") for i in range(start, min(start + batch, len(flags))) if flags[i]]
        known.add(known.new_in([{"broken": broken, "broken_samples": [path for path, _ in broken]}]))
        try:
            known.check(start + batch)
        except DataError:
            return start + batch
    return None


def shuffled(size: int, broken: int, seed: int) -> numpy.ndarray:
    return numpy.random.default_rng(seed).permutation(size) < broken


@pytest.mark.parametrize("size", [20, 100, 2000])
def test_one_more_than_the_share_stops_by_the_end_of_the_epoch(size):
    allowed = size // 20
    for seed in range(20):
        assert stops_at(shuffled(size, allowed + 1, seed), 0.05) is not None


def test_no_more_than_the_share_does_not_stop():
    """Though now and then the first hundred hold twice as many."""
    assert sum(stops_at(shuffled(2000, 100, seed), 0.05) is not None for seed in range(200)) <= 6
    assert all(stops_at(shuffled(100, 5, seed), 0.05) is None for seed in range(50))


def test_three_in_ten_stop_a_large_set_within_its_first_200():
    assert all(stops_at(shuffled(100_000, 30_000, seed), 0.05) <= 200 for seed in range(5))


def test_the_first_few_samples_alone_stop_nothing():
    assert stops_at(numpy.arange(200) < 4, 0.05) is None


def test_a_share_of_one_never_stops_and_of_zero_at_the_first():
    assert stops_at(numpy.ones(200, bool), 1.0) is None
    assert stops_at(numpy.arange(200) == 3, 0.0) == 104


@pytest.mark.parametrize("size, seen, broken", [(6, 4, 4), (1000, 12, 12), (1, 1, 1), (6, 4, 3), (1000, 0, 0)])
def test_a_run_that_could_use_no_sample_is_stopped_however_short(size, seen, broken):
    known = BrokenSamples(size, 0.5)
    known.add([(f"{i}.png", f"{i}.png: bad", "0") for i in range(broken)])
    if seen < size:
        known.check(seen)
    if broken == seen > 0:
        with pytest.raises(DataError, match=f"{seen} of the first {seen} training samples cannot be used"):
            known.check(seen, is_last=True)
    else:
        known.check(seen, is_last=True)
    known.max_share = 1.0
    known.check(seen, is_last=True)


def test_a_second_epoch_counts_nothing_twice():
    known = BrokenSamples(100, 0.05)
    batch = {"broken": [(f"{i}.png", "bad") for i in range(5)], "broken_samples": ["0"] * 5}
    for epoch in range(1, 4):
        known.add(known.new_in([batch]))
        known.check(100 * epoch)
    assert known.new_in([batch]) == []


def test_the_list_is_cut_after_twenty():
    known = BrokenSamples(100, 0.05)
    known.add([(f"{i}", f"{i:02}.png: bad", "0") for i in range(30)])
    with pytest.raises(DataError) as error:
        known.check(100)
    assert "30 of the first 100 training samples cannot be used" in str(error.value)
    assert "19.png" in str(error.value) and "20.png" not in str(error.value)
