"""Exact and normalised match, F1 and ANLS against values worked out by hand from their published definitions."""

import pytest

from sat_lora.training.metrics.scores import Answered
from sat_lora.training.metrics.texts import (
    anls,
    exact_match,
    exact_match_ignoring_case,
    is_same_normalised,
    normalised,
    normalised_match,
    token_f1,
)


def value(measure, prediction, *references):
    return measure(Answered([prediction], [references])).value


@pytest.mark.parametrize(
    "prediction, reference, exact, loose, normal",
    [
        ("Paris", "Paris", 1, 1, 1),
        (" Paris\n", "Paris", 1, 1, 1),
        ("paris", "Paris", 0, 1, 1),
        ("the  Paris!", "Paris", 0, 0, 1),
        ("An apple, a day.", "apple day", 0, 0, 1),
        ("theatre", "atre", 0, 0, 0),  # an article is a word
        ("ＰＡＲＩＳ。", "paris", 0, 0, 1),
        ("“Paris”", "Paris", 0, 0, 1),
        ("", "", 1, 1, 1),
        ("", "x", 0, 0, 0),
        ("x-ray", "xray", 0, 0, 1),
        ("Straße", "STRASSE", 0, 0, 1),
        ("12.5", "125", 0, 0, 1),  # as SQuAD has it
    ],
)
def test_matches(prediction, reference, exact, loose, normal):
    measured = [
        value(measure, prediction, reference) for measure in (exact_match, exact_match_ignoring_case, normalised_match)
    ]
    assert measured == [exact, loose, normal]


def test_the_reference_that_fits_best_counts():
    assert value(exact_match, "b", "a", "b", "c") == 1
    assert value(exact_match, "d", "a", "b", "c") == 0


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("the cat sat", "a cat sat down", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("cat cat cat", "cat", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # a word counts as often as both have it
        ("dog", "cat", 0),
        ("", "", 1),
        ("the", "a", 1),  # nothing is left of either
        ("", "cat", 0),
        ("红色的车", "红车", 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # characters of Chinese are words
        ("車 B 1", "b車", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
    ],
)
def test_f1_of_words(prediction, reference, expected):
    assert token_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("kitten", "sitting", 1 - 3 / 7),  # the textbook's edit distance of 3
        ("KITTEN", "kitten", 1),
        ("a  b", "a b", 1),
        ("ab", "abcd", 0),  # a distance of a half is at the threshold: the equation takes those below it
        ("abc", "abcde", 0.6),
        ("ab", "abcde", 0),  # 0.4 is below
        ("", "", 1),
        ("", "x", 0),
        ("flaw", "lawn", 0),  # 2 of 4
        ("flaws", "lawns", 0.6),
    ],
)
def test_anls(prediction, reference, expected):
    pytest.importorskip("rapidfuzz", reason="pip install 'sat_lora[metrics]'")
    assert anls(prediction, reference) == pytest.approx(expected)


def test_what_is_normalised_stays_so():
    for text in ("The 'quick' (brown) fox...", "a an the", "　全角　スペース", "\u202eabc", "I’m"):
        assert normalised(normalised(text)) == normalised(text)
        assert is_same_normalised(text, normalised(text)) == 1
