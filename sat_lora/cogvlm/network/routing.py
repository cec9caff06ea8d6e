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
    """A permutation of the flattened (batch * seq) tokens that puts those of the vision expert first."""

    order: torch.Tensor  # (batch * seq,) int64: the vision tokens, ascending, then the language tokens, ascending
    restore: torch.Tensor  # (batch * seq,) int64, its inverse
    vision_tokens: int

    @classmethod
    def from_mask(cls, vision_expert_mask: torch.Tensor, device: torch.device | None = None) -> "TokenRouting":
        """Return the routing of a (batch, seq) mask that is non-zero on the tokens of the vision expert.

        device: of the index tensors, by default the mask's. A mask on the CPU makes nobody wait for a GPU.
        """
        flat = vision_expert_mask.reshape(-1) != 0
        order = torch.argsort(~flat, stable=True)
        restore = torch.argsort(order)
        return cls(to_device(order, device), to_device(restore, device), int(flat.sum()))

    @property
    def vision(self) -> torch.Tensor:
        """The places of the vision tokens, (vision tokens,) int64, ascending; a view."""
        return self.order[: self.vision_tokens]

    @property
    def language(self) -> torch.Tensor:
        """The places of the language tokens, (language tokens,) int64, ascending; a view."""
        return self.order[self.vision_tokens :]

    def apply(self, vision: Linear, language: Linear, x: torch.Tensor) -> torch.Tensor:
        """Send the tokens of x (batch, seq, in) through their expert; return them in their places: (batch, seq, out).

        The order of calls is fixed: vision first, then language. Each works on a range of rows of one tensor.
        """
        rows = _Permute.apply(x.reshape(-1, x.shape[-1]), self.order, self.restore)
        of_vision, of_language = rows.split([self.vision_tokens, len(rows) - self.vision_tokens])
        of_vision = vision(of_vision)
        of_language = language(of_language)
        rows = torch.cat([of_vision, of_language])
        return _Permute.apply(rows, self.restore, self.order).view(*x.shape[:-1], -1)


def route(routing: TokenRouting | None, vision: Linear | None, language: Linear, x: torch.Tensor) -> torch.Tensor:
    """Return `routing.apply`, or the language expert's output if there is no routing: a cached decoding step.

    vision: None where the model has no visual expert, and so no routing.
    """
    return language(x) if routing is None or vision is None else routing.apply(vision, language, x)


def to_device(indices: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Return the indices on `device`, by default where they are; nobody waits for a copy that comes from the CPU."""
    if device is not None and device.type == "cuda" and indices.device.type == "cpu":
        indices = indices.pin_memory()
    return indices.to(device, non_blocking=True)


class _Permute(torch.autograd.Function):
    """The rows in another order. The gradient is a gather too; that of `index_select` adds into zeros with atomics."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None
