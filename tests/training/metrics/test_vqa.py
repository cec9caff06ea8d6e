"""VQA accuracy against its published formula, written out, and against values of its published program.

The program is PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA, as it compares texts
since it treats answers and those of people alike; what is expected of texts below was worked out from it.
"""

import itertools

import pytest

from sat_lora.training.metrics.vqa import CONTRACTIONS, normalised, vqa_accuracy


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


@pytest.mark.parametrize(
    "text, expected",
    [
        # A full stop goes unless a digit follows: its pattern, (?!<=\\d)(\\.)(?!\\d), looks for no digit before it.
        ("3.", "3"),
        ("it is 3.", "it is 3"),
        ("10.5.", "10.5"),
        ("1. 2. 3.", "1 2 3"),
        ("v2.0.", "v2.0"),
        (".5", ".5"),
        ("U.S.", "us"),
        ("a.b", "ab"),
        ("yes" + "." * 33, "yes."),  # 32 of them at most, for re.UNICODE is given as a count
        # A comma in a number takes every mark out, instead of making it a space.
        ("$1,000.50", "$1000.50"),
        ("1,2", "12"),
        ("left/right 1,000", "leftright 1000"),
        ("left/right 1, 000", "left right 1 000"),
        ("red , blue", "red blue"),
        ("left-right", "left right"),
        ("left- right-up", "left rightup"),
        ("what's that: it", "what's that: it"),
        # Number words, then articles, then contractions.
        ("Ten.", "10"),
        ("none.", "0"),
        ("The one", "1"),
        ("an apple a day", "apple day"),
        ("twenty one", "twenty 1"),
        ("whats", "what's"),
        ("Hes", "he's"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yallll", "yallll"),
        ("y'allll", "y'all'll"),
        ("'ows'at", "'ow's'at"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # its keys are I'm's, and the text is in lower case by then
        ("lets", "lets"),
        ("shes", "shes"),
        ("everyones", "everyones"),
        ("hed've", "he'd've"),
        # Line ends and tabs are spaces; the marks beside them go.
        ("red-\nblue-green", "red bluegreen"),
        ("red\t-blue", "red blue"),
    ],
)
def test_what_the_published_evaluation_makes_of_a_text(text, expected):
    assert normalised(text) == expected


def test_the_contractions_are_as_many_as_published():
    assert len({*CONTRACTIONS.values()}) == 93 and len(CONTRACTIONS) == 114
    assert not any(
        word in CONTRACTIONS for word in ("its", "were", "well", "shed", "id", "ill", "hell", "shell", "wed")
    )


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [
        # What all people answered is compared as it stands, but for case.
        ("yes.", ["yes"] * 10, 0),
        ("Yes", ["yes"] * 10, 1),
        (" yes\n", ["yes"] * 10, 1),
        ("3.", ["3"] * 10, 0),
        ("3", ["3."] * 10, 0),
        ("the cat", ["cat"] * 10, 0),
        ("a\tcat", ["a cat"] * 10, 1),
        ("three", ["3"] * 10, 0),
        # Where answers differ all of them are normalised, and so is this one.
        ("3.", ["3"] * 9 + ["4"], 1),
        ("the cat", ["cat"] * 5 + ["dog"] * 5, 1),
        ("three", ["3", "3", "three", *["4"] * 7], 0.9),
        ("10.5.", ["10.5", "10.5", *["10"] * 8], 0.6),
        ("yes.", ["yes"] * 9 + ["Yes"], 1),  # these differ, too
    ],
)
def test_answers_of_all_people_alike_are_not_normalised(prediction, answers, expected):
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)
