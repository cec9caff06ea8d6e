"""BLEU, chrF and ROUGE-L as their packages have them, summed as they sum; CIDEr against an independent program."""

import math

import pytest

from sat_lora.training.metrics.captions import bleu, chrf, cider, rouge_l, words_of
from sat_lora.training.metrics.scores import Answered, interval_of

PREDICTIONS = [
    "a cat sits on the mat",
    "two dogs",
    "red",
    "a man is riding a horse",
    "the quick brown fox jumps",
]
REFERENCES = [
    ["a cat sat on the mat", "the cat sits on a mat"],
    ["two dogs run", "2 dogs"],
    ["blue"],
    ["a man rides a horse", "the man is riding a brown horse", "someone is on a horse"],
    ["a quick brown fox jumped over"],
]
# What pycocoevalcap 1.2's Cider().compute_score gives for `words_of` of these.
PUBLISHED = [4.07923496493, 2.503235598515, 0.0, 3.31584708514, 3.240530399047]


def answered(predictions=PREDICTIONS, references=REFERENCES):
    return Answered(predictions, references)


@pytest.mark.parametrize("measure, name", [(bleu, "BLEU"), (chrf, "CHRF")])
def test_the_sum_over_sentences_is_the_packages_corpus(measure, name):
    metrics = pytest.importorskip("sacrebleu.metrics", reason="pip install 'sat_lora[metrics]'")
    streams = [[texts[number] if number < len(texts) else None for texts in REFERENCES] for number in range(3)]
    measured = measure(answered())
    assert measured.value == pytest.approx(getattr(metrics, name)().corpus_score(PREDICTIONS, streams).score, abs=1e-9)
    low, high = interval_of(measured, resamples=200)
    assert 0 <= low < measured.value < high <= 100


def test_bleu_by_hand():
    """Papineni et al.: precisions 5/6, 3/5, 1/4 and 0.5/3 (smoothed), and no penalty for the length."""
    pytest.importorskip("sacrebleu", reason="pip install 'sat_lora[metrics]'")
    measured = bleu(Answered(["the cat is on the mat"], [["the cat was on the mat"]]))
    assert measured.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)


def test_rouge_by_hand():
    """Lin: a longest common subsequence of 3, of 4 words each."""
    pytest.importorskip("rouge_score", reason="pip install 'sat_lora[metrics]'")
    measured = rouge_l(Answered(["police kill the gunman", "红色的车"], [["police killed the gunman"], ["红车"]]))
    assert measured.samples == pytest.approx([3 / 4, 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)])


def test_cider_is_that_of_the_published_program():
    measured = cider(answered())
    assert measured.samples == pytest.approx(PUBLISHED, abs=1e-9)
    assert measured.value == pytest.approx(sum(PUBLISHED) / len(PUBLISHED))


def test_cider_by_hand():
    """Two samples of one word each: the word is in half of the samples, the cosine of 1-grams is 1, of others 0."""
    measured = cider(Answered(["cat", "cow"], [["cat"], ["dog"]]))
    assert measured.samples == pytest.approx([10 / 4, 0])
    longer = cider(Answered(["cat cat"], [["cat"]]))
    assert longer.samples == [0]  # in every sample, it says nothing
    clipped = cider(Answered(["cat cat", "dog"], [["cat"], ["dog"]])).samples[0]
    # Weights 2 log 2 and log 2, the first cut to the second; one 2-gram against none.
    assert clipped == pytest.approx(10 / 4 * (1 * 1) / (2 * 1) * math.exp(-1 / 72))


@pytest.mark.parametrize("measure", [cider])
@pytest.mark.parametrize("predictions, references", [([""], [["a"]]), (["a"], [[""]]), (["<b>", "。"], [["b"], ["!"]])])
def test_texts_without_words_are_no_mistake(measure, predictions, references):
    assert all(0 <= score <= 10 for score in measure(Answered(predictions, references)).samples)


def test_words():
    assert words_of("The dog's 2 red-brown toys, 红色!") == ["the", "dog's", "2", "red", "brown", "toys", "红", "色"]
