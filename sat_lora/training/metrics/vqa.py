"""VQA accuracy (Antol et al. 2015, arXiv:1505.00468) as its published evaluation calculates it.

Of an answer that n of 10 people gave it is min(1, n / 3), averaged over the ten ways to leave one of them out. What is
compared is that of PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA, where it differs
from what its authors seem to have meant as well: published figures are of that.
"""

import re
from collections.abc import Iterator, Sequence

from sat_lora.training.metrics.scores import mean_of

AGREED = 3
"""People who have to have given an answer for it to count in full."""
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
_BEGINNINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "n't've": "could had might should would",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock y'all 'twas 'ow's'at",
}
"""What contractions begin with, by how they end. Those of `I` are none of them, nor are `its` and `lets`."""


def _spellings() -> Iterator[tuple[str, str]]:
    """Yield (a contraction that lacks one of its apostrophes, the contraction)."""
    for end, beginnings in _BEGINNINGS.items():
        for beginning in beginnings.split():
            word = beginning + end
            for place in (match.start() for match in re.finditer("'", word)):
                yield word[:place] + word[place + 1 :], word
    yield "somebody'd", "somebodyd"  # the other way round there


CONTRACTIONS = dict(_spellings())
MARKS = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOPS = 32
"""How many go, at most: the evaluation hands re.UNICODE to `sub` as a count."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalised(text: str) -> str:
    """Return the text as answers are compared that differ: in lower case, number words as digits, without articles,
    contractions with their apostrophe. A punctuation mark that stands beside a space somewhere goes, and every mark
    does where there is a comma in a number; else it becomes a space. A full stop goes unless a digit follows.
    """
    text = stripped(text)
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in MARKS:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_beside_space or has_number else " ")
    plain = _FULL_STOP.sub("", plain, count=FULL_STOPS).lower()
    tokens = (NUMBERS.get(word, word) for word in plain.split())
    return " ".join(CONTRACTIONS.get(token, token) for token in tokens if token not in ARTICLES)


def stripped(text: str) -> str:
    """Return the text without what surrounds it, its line ends and tabs as spaces."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Return the accuracy of an answer, given what people answered; of so few that the formula never gives 1, whether
    any of them gave it.

    Where all of more people gave the same answer, it is compared as it stands, but for case: "yes." is none of "yes".
    """
    answers = [*map(stripped, references)]
    compared = str.lower if len(answers) > AGREED and len(set(answers)) == 1 else normalised
    said = compared(stripped(prediction))
    right = [compared(answer) == said for answer in answers]
    if len(right) <= AGREED:
        return float(any(right))
    agreeing = sum(right)
    others = [min(1.0, (agreeing - own) / AGREED) for own in right]
    return sum(others) / len(others)


accuracy = mean_of(vqa_accuracy)
