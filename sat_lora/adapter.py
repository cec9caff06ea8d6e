"""The trainable pair A, B of one linear."""

import math
import zlib

import torch
from torch import nn

from sat_lora._sat import mpu
from sat_lora.functional import DeltaLayout, add_delta
from sat_lora.sharding import REPLICATED, Sharding, mark_sharded, model_parallel_layout
from sat_lora.targets import LinearSite


def bounded_rank(rank: int, in_features: int, out_features: int) -> int:
    """`rank`, halved until A and B together cost no more than the full matrix: r <= in out / (in + out + 1)."""
    while rank > 1 and rank * (in_features + out_features + 1) > in_features * out_features:
        rank //= 2
    return rank


class LoraAdapter(nn.Module):
    """Adds scale * B A x to the output of one linear.

    A: (slots * r, in), B: (adapted rows, r), both cut over the model-parallel ranks as the linear demands:

        column-parallel   A whole on every rank        B cut like the rows of the weight, within each of q, k, v
        row-parallel      A cut along `in`             B whole, added after the base's own sum
        plain             both whole

    The parameters sit directly on this module, and it is called as a module, so that ZeRO-3 gathers them.
    """

    def __init__(
        self, site: LinearSite, rank: int, scale: float, slots: tuple[str, ...], dropout: float, dtype, device
    ):
        super().__init__()
        self.name, self.rank, self.scale, self.dropout = site.name, rank, scale, dropout
        self.slots = tuple(slot for slot in site.slot_names if slot in slots)
        self.in_features = site.in_features
        self.slot_rows = site.slot_rows(self.slots)  # of the whole weight
        self._scatter_input = site.kind == "row" and not site.module.input_is_parallel
        self._gathered = site.kind == "column" and site.module.gather_output
        self.shardings = {
            "A": Sharding(1) if site.kind == "row" else REPLICATED,
            "B": Sharding(0, tuple(stop - start for start, stop in self.slot_rows))
            if site.kind == "column"
            else REPLICATED,
        }
        _, size = model_parallel_layout()
        cut = size if site.kind == "column" else 1  # ranks that share the output
        local_rows = tuple((start // cut, stop // cut) for start, stop in self.slot_rows)
        self.layout = DeltaLayout(local_rows, site.out_features // cut, site.kind)
        rows = sum(stop - start for start, stop in self.layout.slots)
        columns = site.in_features // (size if site.kind == "row" else 1)
        for leaf, shape in (("A", (max(1, len(self.slots)) * rank, columns)), ("B", (rows, rank))):
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            self.register_parameter(leaf, mark_sharded(parameter, self.shardings[leaf]))

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """A uniform in +-1/sqrt(in) (PEFT's Kaiming-uniform with a = sqrt(5)), B zero.

        The whole A is drawn from a generator seeded by `seed` and the linear's name, then cut, so the values depend
        neither on the model-parallel size nor on what else is adapted.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) ^ seed)
        bound = 1 / math.sqrt(self.in_features)
        whole = torch.empty(self.A.shape[0], self.in_features).uniform_(-bound, bound, generator=generator)
        self.A.copy_(self.shardings["A"].shard(whole, *model_parallel_layout()))
        self.B.zero_()

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y (..., out) as the base linear gave it for x (..., in), with the delta added."""
        if self._scatter_input:
            x = mpu.scatter_to_model_parallel_region(x)
        keep, scale = None, self.scale
        if self.training and self.dropout > 0:
            keep = torch.empty(x.shape[:-1].numel(), x.shape[-1], dtype=torch.bool, device=x.device)
            keep.bernoulli_(1 - self.dropout)
            scale = scale / (1 - self.dropout)
        if self._gathered and model_parallel_layout()[1] > 1:
            delta = add_delta(
                y.new_zeros(*y.shape[:-1], self.layout.width), x, self.A, self.B, keep, scale, self.layout
            )
            return y + mpu.gather_from_model_parallel_region(delta)
        return add_delta(y, x, self.A, self.B, keep, scale, self.layout)

    def extra_repr(self) -> str:
        return f"{self.name}, r={self.rank}, scale={self.scale:g}" + (f", slots={self.slots}" if self.slots else "")
