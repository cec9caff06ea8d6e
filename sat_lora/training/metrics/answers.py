"""What a metric is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sat_lora.cogvlm.inputs.text import IGNORED


@dataclass(frozen=True)
class Answers:
    """The answer tokens of a batch, in the order of its samples, each with what the model makes of those before it."""

    logits: torch.Tensor
    """The logits (tokens, vocabulary), in the dtype of the model's head."""
    labels: torch.Tensor
    """The tokens that are right: int64 (tokens,)."""
    samples: torch.Tensor
    """The row of the batch that each token belongs to: int64 (tokens,)."""
    batch_size: int
    """The rows of the batch; some may have no answer."""


@dataclass(frozen=True)
class Ratio:
    """A share or mean as scalars: both are summed over batches and ranks, and the sums divided."""

    total: torch.Tensor
    count: torch.Tensor | float


Metric = Callable[[Answers], Ratio]
"""A function that measures a batch, which may have no answer token at all; in it the host should not wait for the
device.
"""


class AnswersOf:
    """The answers of a batch, put together while the model runs on it: to be its `on_logits`, for one forward pass."""

    def __init__(self) -> None:
        self._logits: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take the next rows of logits (rows, vocabulary), and their labels (rows,)."""
        self._logits.append(logits)
        self._labels.append(labels)

    def answers(self, labels: torch.Tensor) -> Answers:
        """Return all answers that were taken. labels: (batch, seq) of the batch, on the host."""
        samples = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
        logits = torch.cat(self._logits)
        samples = samples.to(logits.device, non_blocking=True)
        return Answers(logits, torch.cat(self._labels), samples, len(labels))
