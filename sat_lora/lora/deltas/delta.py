"""The delta of a weight: what an adapter holds, a file stores, a merge adds and a combination sums."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Delta:
    """The matrix s B A that is added to a weight W (out, in), see `layers` for what W is.

    Of one pair, A is (r, in) and B (rows, r). The pairs of a layer's slots are one delta too: A (slots * r, in) and
    B (rows of all slots, r), and a `DeltaLayout` says which rows of W those are.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The rank r, the columns of B."""
        rank: int = self.b.shape[1]
        return rank

    def to(self, dtype: torch.dtype) -> "Delta":
        """Return the same delta with A and B in that dtype."""
        return Delta(self.a.to(dtype), self.b.to(dtype), self.scale)
