"""Which tokens go through the vision expert and which through the language expert, worked out once per batch.

The published model indexes with boolean masks in every layer, and each of those waits for the device. It also skips an
expert that has no token, so ranks whose batches differ make different collectives, and ZeRO hangs. Here both experts
always run, on an empty slice if need be: a matrix product over zero rows costs nothing and gives zero gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TokenRouting:
    """Index tensors over the flattened (batch * seq) tokens."""

    vision: torch.Tensor  # (vision tokens,) int64, ascending
    language: torch.Tensor  # (language tokens,) int64, ascending
    restore: torch.Tensor  # (batch * seq,) int64: position of each token in [vision; language]

    @classmethod
    def from_mask(cls, vision_expert_mask: torch.Tensor) -> "TokenRouting":
        """From a (batch, seq) mask that is non-zero on the tokens of the vision expert."""
        flat = vision_expert_mask.reshape(-1) != 0
        order = torch.argsort(~flat, stable=True)
        vision_tokens = int(flat.sum())
        return cls(order[:vision_tokens], order[vision_tokens:], torch.argsort(order))

    def apply(self, vision: Linear, language: Linear, x: torch.Tensor) -> torch.Tensor:
        """Send the tokens of (batch, seq, in) through their expert and put them back: (batch, seq, out).

        The order of calls is fixed: vision first, then language.
        """
        flat = x.reshape(-1, x.shape[-1])
        outputs = [vision(flat.index_select(0, self.vision)), language(flat.index_select(0, self.language))]
        return torch.cat(outputs).index_select(0, self.restore).view(*x.shape[:-1], -1)


def route(routing: TokenRouting | None, vision: Linear, language: Linear, x: torch.Tensor) -> torch.Tensor:
    """`routing.apply`, or the language expert alone where there is no routing: a cached decoding step."""
    return language(x) if routing is None else routing.apply(vision, language, x)
