"""VQA accuracy against its published formula, written out."""

import itertools

import pytest

from sat_lora.training.metrics.vqa import normalised, vqa_accuracy


@pytest.mark.parametrize("agreeing, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_of_ten_people(agreeing, expected):
    """Antol et al.: min(1, n / 3) of nine people, averaged over who is left out."""
    answers = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    nine = list(itertools.combinations(answers, 9))
    formula = sum(min(1, group.count("yes") / 3) for group in nine) / len(nine)
    assert vqa_accuracy("yes", answers) == pytest.approx(formula) == pytest.approx(expected)


def test_of_fewer_than_the_formula_needs_any_that_agrees_counts():
    assert vqa_accuracy("Yes.", ["yes"]) == 1
    assert vqa_accuracy("2", ["three", "two", "one"]) == 1
    assert vqa_accuracy("4", ["three", "two"]) == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Two dogs", "2 dogs"),
        ("the  man", "man"),
        ("none", "0"),
        ("1,000", "1000"),
        ("yes, it is", "yes it is"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("3.5", "3.5"),
        ("Mr. Smith.", "mr smith"),
        ("dont know", "don't know"),
        ("isn't", "isn't"),
        ("its", "its"),
        ("(left)", "left"),
        ("\nA\tcat ", "cat"),
        ("", ""),
    ],
)
def test_what_is_compared(text, expected):
    assert normalised(text) == expected
