"""The time that patterns may take, over all the names that they are tried on."""

from contextlib import contextmanager, nullcontext

import pytest

from sat_lora.errors import ConfigError
from sat_lora.files import patterns
from sat_lora.files.patterns import LONGEST, matches, pattern_problem, shortened


@pytest.fixture(autouse=True)
def nothing_spent(monkeypatch):
    monkeypatch.setattr(patterns, "_spent", {})


def test_a_pattern_may_have_as_many_characters_as_the_bound_says():
    assert pattern_problem("a" * LONGEST) is None
    assert pattern_problem("a" * (LONGEST + 1)) == f"has {LONGEST + 1} characters, wanted {LONGEST} at most"


def test_a_pattern_is_shown_whole_up_to_100_characters():
    assert shortened("a" * 98) == repr("a" * 98)
    assert shortened("a" * 99) == f"'{'a' * 99} ..."


def test_a_pattern_that_repeats_nothing_is_matched_whole():
    assert matches("layers.0.q", "layers.0.q") is True
    assert matches("layers.0.q", "layers.0.qk") is False is matches("ayers.0.q", "layers.0.q")


def test_the_times_of_slow_matches_add_up_until_none_is_left(monkeypatch):
    left = []

    @contextmanager
    def timed(seconds):
        left.append(round(seconds, 6))
        if seconds <= 0:
            raise patterns._TooSlow
        yield [0.75]

    monkeypatch.setattr(patterns, "_interrupted_after", timed)
    assert [matches("a+", "aa"), matches("b+", "aa"), matches("a+", "ba"), matches("a+", "a")] == [
        True,
        False,
        False,
        True,
    ]
    with pytest.raises(ConfigError, match=r"the pattern 'a\+' takes more than 2 s to match"):
        matches("a+", "aa")
    assert left == [2.0, 2.0, 1.25, 0.5, -0.25]
    assert patterns._spent == {"a+": 2.0, "b+": 0.75}


def test_a_match_that_takes_less_than_what_is_noted_does_not_count(monkeypatch):
    monkeypatch.setattr(patterns, "_interrupted_after", lambda seconds: nullcontext([patterns.NOTED]))
    assert matches("a+", "aa") is True
    assert patterns._spent == {}
