"""Metrics that compare a generated answer with the right one as texts."""

import re
import string
import unicodedata
from collections import Counter

from sat_lora.training.metrics.generated import without_package
from sat_lora.training.metrics.scores import best_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKENS = re.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")
ANLS_THRESHOLD = 0.5
"""The normalised distance from which on an answer is wrong: the equation has 1 - NL where NL < 0.5, else 0. The scripts
of some challenges keep a distance of exactly 0.5.
"""


def is_same(prediction: str, reference: str) -> float:
    """Return whether the two are the same, spaces around them aside."""
    return float(prediction.strip() == reference.strip())


def is_same_ignoring_case(prediction: str, reference: str) -> float:
    """Return whether the two are the same in lower case, spaces around them aside."""
    return float(prediction.strip().lower() == reference.strip().lower())


def normalised(text: str) -> str:
    """Return the text as SQuAD compares it (Rajpurkar et al. 2016, arXiv:1606.05250): in lower case, without
    punctuation, the articles a, an and the, and spaces more than one.

    Beyond ASCII it is Unicode's NFKC form and Unicode's punctuation: ａ is a, and 。 is nothing.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join(_ARTICLES.sub(" ", text).split())


def is_same_normalised(prediction: str, reference: str) -> float:
    """Return whether the two are the same after `normalised`."""
    return float(normalised(prediction) == normalised(reference))


def tokens_of(text: str) -> list[str]:
    """Return what stands between spaces; characters of Chinese and Japanese, which have none, one by one."""
    return _TOKENS.findall(text)


def token_f1(prediction: str, reference: str) -> float:
    """Return SQuAD's F1 of the words that the two share (Rajpurkar et al. 2016), after `normalised`; characters of
    Chinese and Japanese are words. Without a word in one of them it is 1 if the other has none either, else 0.
    """
    said, right = (tokens_of(normalised(text)) for text in (prediction, reference))
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right))


def anls(prediction: str, reference: str) -> float:
    """Return 1 - the edit distance over the length of the longer text, 0 where that is a half or less; both texts in
    lower case and with single spaces (Biten et al. 2019, arXiv:1905.13648, equation 1). Needs rapidfuzz.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise without_package("anls", "rapidfuzz") from error
    texts = [" ".join(text.lower().split()) for text in (prediction, reference)]
    similarity = Levenshtein.normalized_similarity(*texts)
    return float(similarity) if similarity > 1 - ANLS_THRESHOLD else 0.0


exact_match = best_of(is_same)
exact_match_ignoring_case = best_of(is_same_ignoring_case)
normalised_match = best_of(is_same_normalised)
answers_f1 = best_of(token_f1)
answers_anls = best_of(anls)
