"""VQA accuracy (Antol et al. 2015, arXiv:1505.00468) with the normalisation of its published evaluation.

Of an answer that n of 10 people gave it is min(1, n / 3), averaged over the ten ways to leave one of them out.
"""

import re
from collections.abc import Sequence

from sat_lora.training.metrics.scores import mean_of

AGREED = 3
"""People who have to have given an answer for it to count in full."""
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
# Words that are no others without their apostrophe, unlike "its" and "were".
CONTRACTIONS = {
    word.replace("'", ""): word
    for word in """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't
    shouldn't wasn't weren't won't wouldn't could've might've must've should've would've i've they've we've you've
    i'm it'd it'll that's there's they'd they'll they're what's where's who's why's you'd you'll you're o'clock y'all
    he'd he's how's let's she's somebody's someone's everyone's
    """.split()
}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")


def normalised(text: str) -> str:
    """Return the text as answers are compared: in lower case, number words as digits, without articles, contractions
    with their apostrophe. A punctuation mark that stands beside a space somewhere goes, another becomes a space; the
    comma in a number goes, and a full stop that is not beside a digit.
    """
    text = " ".join(text.split()).lower()
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in MARKS:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_beside_space or has_number else " ")
    tokens = (NUMBERS.get(word, word) for word in _FULL_STOP.sub("", plain).split())
    return " ".join(CONTRACTIONS.get(token, token) for token in tokens if token not in ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Return the accuracy of an answer, given what people answered; of so few that the formula never gives 1, whether
    any of them gave it.
    """
    said = normalised(prediction)
    right = [normalised(reference) == said for reference in references]
    if len(right) <= AGREED:
        return float(any(right))
    agreeing = sum(right)
    others = [min(1.0, (agreeing - own) / AGREED) for own in right]
    return sum(others) / len(others)


accuracy = mean_of(vqa_accuracy)
