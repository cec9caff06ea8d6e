"""Metrics of captions and translations: BLEU and chrF by sacrebleu, ROUGE-L by rouge-score, and CIDEr-D.

CIDEr is our own: of the packages that have it, pycocoevalcap has had no release since 2020, and aac-metrics holds numpy
below 2. tests/training/metrics/test_captions.py compares it with the former.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sat_lora.training.metrics.generated import without_package
from sat_lora.training.metrics.scores import Answered, Scores, mean_of, mean_scores

LONGEST_N = 4
SIGMA = 6.0  # of the penalty for another length, in words
_WORDS = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def bleu(answered: Answered) -> Scores:
    """Return BLEU of the corpus in [0, 100] (Papineni et al. 2002) as sacrebleu has it; of a sample that of its
    sentence.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise without_package("bleu", "sacrebleu") from error
    return _sacrebleu(answered, BLEU(), BLEU(effective_order=True))


def chrf(answered: Answered) -> Scores:
    """Return chrF of the corpus in [0, 100] (Popović 2015) as sacrebleu has it; of a sample that of its sentence."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise without_package("chrf", "sacrebleu") from error
    return _sacrebleu(answered, CHRF(), CHRF())


def _sacrebleu(answered: Answered, corpus, sentence) -> Scores:
    """Return the scores of a metric of sacrebleu's, which sums its statistics over sentences.

    corpus, sentence: the metric, as it is configured for either.
    """
    most = max(map(len, answered.references), default=1)
    # Sentences may have fewer references than others: None stands for one that is not there.
    streams = [
        [references[number] if number < len(references) else None for references in answered.references]
        for number in range(most)
    ]
    statistics = np.array(corpus._extract_corpus_statistics(answered.predictions, streams), dtype=np.float64)
    samples = [
        float(sentence.sentence_score(prediction, [*references]).score)
        for prediction, references in zip(answered.predictions, answered.references)
    ]
    return Scores(
        samples, statistics, lambda sums: float(corpus._compute_score_from_stats([int(x) for x in sums]).score)
    )


def rouge_l(answered: Answered) -> Scores:
    """Return the mean F-measure of ROUGE-L in [0, 1] (Lin 2004) as rouge-score has it, of the reference that fits best;
    words of any script are tokens, and characters of Chinese and Japanese.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise without_package("rouge-l", "rouge_score") from error
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    return mean_of(lambda prediction, references: scorer.score_multi([*references], prediction)["rougeL"].fmeasure)(
        answered
    )


class _Tokenizer:
    """The tokens of rouge-score, whose own drops all that is not a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; a character of Chinese or Japanese is a word."""
    from sat_lora.training.metrics.texts import tokens_of

    return [token for word in _WORDS.findall(text.lower()) for token in tokens_of(word)]


def cider(answered: Answered) -> Scores:
    """Return CIDEr-D in [0, 10] (Vedantam et al. 2015, arXiv:1411.5726, equations 2 to 4 and section 6).

    Papers say 100 times as much. How rare words are is counted over the references of all samples, each sample once; a
    bootstrap keeps these counts. Words are those of `words_of`, without the stemming of the paper, as in the published
    implementation.
    """
    references = [[_counts(words_of(text)) for text in texts] for texts in answered.references]
    documents: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        documents.update(set().union(*texts))
    log_samples = math.log(max(1, len(references)))
    weigh = _Weigher(documents, log_samples)
    samples = []
    for prediction, texts in zip(answered.predictions, references):
        said = weigh(_counts(words_of(prediction)))
        samples.append(10 * sum(said.likeness(weigh(text)) for text in texts) / len(texts))
    return mean_scores(samples)


def _counts(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Return how often each n-gram of 1 to LONGEST_N words is in a text."""
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, LONGEST_N + 1) for start in range(len(tokens) - n + 1)
    )


class _Weighted:
    """A text as one vector per n of its n-grams' counts, each times how rare it is."""

    def __init__(self, weights: list[dict[tuple[str, ...], float]], length: int):
        self.weights = weights
        self.norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in weights]
        self.length = length

    def likeness(self, reference: "_Weighted") -> float:
        """Return the mean over n of the cosine to a reference, weights beyond the reference's cut off, times the
        penalty for another length.
        """
        penalty = math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for own, other, norm, other_norm in zip(self.weights, reference.weights, self.norms, reference.norms):
            if norm and other_norm:
                product = sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in own.items())
                total += product / (norm * other_norm)
        return penalty * total / LONGEST_N


class _Weigher:
    """Weighs texts by how many samples have each n-gram in a reference."""

    def __init__(self, documents: Counter[tuple[str, ...]], log_samples: float):
        self._documents = documents
        self._log_samples = log_samples

    def __call__(self, counts: Counter[tuple[str, ...]]) -> _Weighted:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST_N)]
        for gram, count in counts.items():
            rarity = self._log_samples - math.log(max(1, self._documents[gram]))
            weights[len(gram) - 1][gram] = count * rarity
        # The published implementation takes the number of 2-grams for the length.
        return _Weighted(weights, sum(count for gram, count in counts.items() if len(gram) == 2))


def perplexity(answered: Answered) -> Scores:
    """Return exp of the mean cross-entropy of all tokens of the right answers, their ends included; of a sample, of its
    own tokens.
    """
    statistics = np.array(answered.answer_losses, dtype=np.float64).reshape(-1, 2)
    samples = [_perplexity(pair) for pair in statistics]
    return Scores(samples, statistics, _perplexity)


def _perplexity(sums: np.ndarray) -> float:
    total, tokens = (float(number) for number in sums)
    return math.exp(min(700.0, total / tokens)) if tokens else math.nan
