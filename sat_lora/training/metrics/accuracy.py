"""How much of the answers the model would say, given all of the answer that comes before."""

import torch

from sat_lora.training.metrics.answers import Answers, Ratio


def token_accuracy(answers: Answers) -> Ratio:
    """Return the share of answer tokens that are the likeliest."""
    return Ratio(_is_right(answers).sum(), len(answers.labels))


def answer_accuracy(answers: Answers) -> Ratio:
    """Return the share of answers all of whose tokens are the likeliest: those that greedy decoding would say word for
    word.
    """
    is_right = _is_right(answers)
    tokens, right = (torch.zeros(answers.batch_size, device=is_right.device) for _ in range(2))
    tokens.index_add_(0, answers.samples, torch.ones_like(is_right, dtype=tokens.dtype))
    right.index_add_(0, answers.samples, is_right.to(right.dtype))
    has_answer = tokens > 0
    return Ratio((has_answer & (right == tokens)).sum(), has_answer.sum())


def _is_right(answers: Answers) -> torch.Tensor:
    """Return for each answer token whether it is the likeliest: bool (tokens,)."""
    return answers.logits.argmax(-1) == answers.labels
