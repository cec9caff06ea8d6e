"""What one adapted layer trains."""

import zlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from sat_lora.lora.config import LOFTQ, LoraConfig
from sat_lora.lora.deltas import dora, loftq
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.deltas.initialize import initial_delta
from sat_lora.lora.deltas.layers import LayerDelta
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.lora.deltas.merging import merged_weight
from sat_lora.lora.targets import Target
from sat_lora.parallel.sharding import (
    REPLICATED,
    Sharding,
    gathered,
    mark_sharded,
    model_parallel_layout,
    over_model_parallel,
    sharding_of,
)
from sat_lora.quantized.layers import quantized_weight_of
from sat_lora.quantized.quantized_weight import LowRank, QuantizedWeight, whole


class LoraAdapter(nn.Module):
    """Adds scale * B A x to the output of one layer.

    A: (slots * r, in), B: (adapted rows, r), for the layer's weight as a matrix W (out, in), see `deltas.layers`. Both
    are cut over the model-parallel ranks as W is:

        W cut along out   A whole on every rank        B cut like the rows of W, within each of q, k, v
        W cut along in    A cut along `in`             B whole, added after the layer's own sum
        W whole           both whole

    With DoRA, `magnitude` (adapted rows,) is cut like B. With PiSSA and OLoRA, the pair that A and B began as stays
    as `origin_A` and `origin_B`, and the delta is s (B A - origin_B origin_A): the base weight is never written to.
    With LoftQ as well; there the quantised weight W becomes Q + s origin_B origin_A first, see `deltas.loftq`.

    The parameters sit directly on this module, and it is called as a module, so that ZeRO-3 gathers them.
    """

    leaves = ("A", "B")  # the names of A and B among the parameters

    def __init__(self, target: Target, config: LoraConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.target = target
        self.name = target.site.name
        self.rank = target.rank
        self.scale = target.scale
        self.slots = target.slots
        self.kind = target.site.kind
        self.dropout = config.lora_dropout
        self.scheme = config.init_lora_weights
        self.rounds = config.loftq_iter
        self.seed = zlib.crc32(self.name.encode()) ^ config.seed
        rows = [stop - start for start, stop in target.rows]
        blocks = tuple(rows) if self.slots else target.site.blocks
        cut_rows = Sharding(0, blocks) if self.kind.cut == "out" else REPLICATED
        self.shardings = {"A": Sharding(1) if self.kind.cut == "in" else REPLICATED, "B": cut_rows}
        _, size = model_parallel_layout()
        cut_out, cut_in = (size if self.kind.cut == side else 1 for side in ("out", "in"))
        local_rows = tuple((start // cut_out, stop // cut_out) for start, stop in target.rows)
        self.layout = DeltaLayout(local_rows, target.site.out_features // cut_out, self.kind.name, size)
        shapes: dict[str, tuple[int, ...]] = {
            "A": (target.slots_count * self.rank, target.site.in_features // cut_in),
            "B": (sum(rows) // cut_out, self.rank),
        }
        if config.use_dora:
            self.shardings["magnitude"] = cut_rows
            shapes["magnitude"] = (sum(rows) // cut_out,)
        self.in_graph: dict[str, torch.Tensor] = {}
        """What the delta uses in place of the parameters of those names, see `gradient_order`."""
        for leaf, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            self.register_parameter(leaf, mark_sharded(parameter, self.shardings[leaf]))
        if config.lr_ratio != 1:
            self.B.lr_scale = config.lr_ratio  # what SAT's trainer multiplies the rate by
        self.freeze_a = config.freeze_a
        for leaf in ("A", "B") if config.takes_from_base else ():
            self.register_buffer(f"origin_{leaf}", torch.empty_like(getattr(self, leaf), requires_grad=False))

    def trainable(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters, without A where that is frozen (LoRA-FA)."""
        yield from (p for leaf, p in self._parameters.items() if leaf != "A" or not self.freeze_a)

    @property
    def has_origin(self) -> bool:
        """Whether the pair that A and B began as is subtracted (PiSSA, OLoRA, LoftQ)."""
        return "origin_A" in self._buffers

    @property
    def is_plain(self) -> bool:
        """Whether the delta is s B A x beside x W^T, each rank's part on its own columns, and nothing more."""
        layer = self.target.site.module
        _, mp_size = model_parallel_layout()
        joins_ranks = getattr(layer, "gather_output", False) or not getattr(layer, "input_is_parallel", True)
        is_pair = not self.has_origin and self.magnitude_or_none is None
        return self.kind.is_product and is_pair and not (joins_ranks and mp_size > 1)

    @property
    def magnitude_or_none(self) -> nn.Parameter | None:
        """The magnitude (adapted rows,) of DoRA; None without DoRA."""
        return self._parameters.get("magnitude")

    @torch.no_grad()
    def reset_parameters(self, layer: nn.Module) -> None:
        """Give the parameters their initial values for `layer`, the adapted one; every rank has to call it.

        Values depend on the seed, the layer's name and, for some schemes and DoRA, its weight; not on the parallel
        layout nor on what else is adapted.
        """
        with gathered([layer.weight]), gathered(self.parameters(), write=True):
            rank_and_size = model_parallel_layout()
            quantized = quantized_weight_of(layer) if self.scheme == LOFTQ else None
            encoded = None if quantized is None else self.encoded_part(layer, self.rank, self.rounds)
            initial = self._initial(layer) if encoded is None else self._error_of(layer, encoded)
            for leaf, factor in (("A", initial.a), ("B", initial.b)):
                parameter = getattr(self, leaf)
                parameter.copy_(self.shardings[leaf].shard(factor, *rank_and_size))
                if self.has_origin:
                    getattr(self, f"origin_{leaf}").copy_(parameter)
            if encoded is not None:
                self.approximate(layer, encoded, self.origin_A, self.origin_B)
            if self.magnitude_or_none is not None:
                self.magnitude.copy_(self._row_norms(layer, None))

    def _initial(self, layer: nn.Module) -> Delta:
        """Return the whole pair that A and B begin as, where that asks for no codes of the weight."""
        site = self.target.site

        def whole_rows(start: int, stop: int) -> torch.Tensor:
            sharding = sharding_of(layer, "weight")
            weight = whole(layer.weight.detach())
            return self.kind.matrix(over_model_parallel(weight, sharding))[start:stop]

        return initial_delta(
            "kaiming" if self.scheme == LOFTQ else self.scheme,  # of a weight that is whole, LoftQ has no error to take
            [partial(whole_rows, start, stop) for start, stop in self.target.rows],
            [(stop - start, site.in_features) for start, stop in self.target.rows],
            rank=self.rank,
            scale=self.scale,
            is_embedding=self.kind.is_embedding,
            seed=self.seed,
        )

    def encoded_part(self, layer: nn.Module, rank: int, rounds: int) -> torch.Tensor:
        """Return the whole W - L_{T-1} (out, in) of LoftQ; every model-parallel rank has to call it.

        Raises ConfigError where the weight that was quantised is not to be had any more.
        """
        weight = layer.weight
        return loftq.encoded_part(
            self._original(layer), self.target.rows, weight.scheme, weight.block, rank=rank, rounds=rounds
        )

    def _error_of(self, layer: nn.Module, encoded: torch.Tensor) -> Delta:
        """Return the whole pair that LoftQ begins with, of what `encoded_part` has returned."""
        weight = layer.weight
        rows = self.target.rows
        return loftq.low_rank_part(
            self._original(layer), encoded, rows, weight.scheme, weight.block, rank=self.rank, scale=self.scale
        )

    def _original(self, layer: nn.Module) -> torch.Tensor:
        """Return the whole matrix W (out, in) that the layer's codes were made of, in float32 or wider."""
        original = layer.weight.read_original(f"{self.name}.weight").to(layer.weight.device)
        matrix = self.kind.matrix(over_model_parallel(original, sharding_of(layer, "weight")))
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    def approximate(self, layer: nn.Module, encoded: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Let the layer's quantised weight be Q + s B A.

        encoded: what Q is made of, whole, see `encoded_part`; a, b: this rank's parts of the pair of all slots.
        """
        weight = layer.weight
        part = sharding_of(layer, "weight").shard(encoded, *model_parallel_layout())
        approximated = QuantizedWeight.of(part, weight.scheme, f"{self.name}.weight")
        approximated.low_rank = LowRank(b, a, self.scale, self.layout.slots)
        weight.take(approximated)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy whole A, B and magnitude, as a file has them by name, into this rank's parts of the parameters.

        Where an origin is subtracted, A and B hold both pairs, as `delta` gives them.
        """
        for leaf, tensor in tensors.items():
            part = self.shardings[leaf].shard(tensor, *model_parallel_layout())
            if self.has_origin and leaf == "A":
                pair = part.view(self.target.slots_count, 2, self.rank, -1)
                self.A.copy_(pair[:, 0].flatten(0, 1))
                self.origin_A.copy_(pair[:, 1].flatten(0, 1))
            elif self.has_origin and leaf == "B":
                self.B.copy_(part[:, : self.rank])
                self.origin_B.copy_(-part[:, self.rank :])
            else:
                getattr(self, leaf).copy_(part)

    @property
    def delta_rank(self) -> int:
        """The rank r or 2r of what `delta` returns."""
        return 2 * self.rank if self.has_origin else self.rank

    def delta(self, scale: float = 1.0) -> Delta:
        """Return this rank's part of `scale` times the delta of all slots: A (slots * r, in), B (adapted rows, r).

        That is the pair itself, or a pair of rank 2r where an origin is subtracted.
        """
        return Delta(*self._factors({}), self.scale * scale)

    def _factors(self, instead: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of the delta; `instead` has what stands for the parameters of those names."""
        a, b = (instead.get(leaf, getattr(self, leaf)) for leaf in "AB")
        if not self.has_origin:
            return a, b
        slots = self.target.slots_count
        pairs = [factor.view(slots, self.rank, -1) for factor in (a, self.origin_A)]
        return torch.cat(pairs, 1).flatten(0, 1), torch.cat([b, -self.origin_B], 1)

    def forward(
        self, y: torch.Tensor, x: torch.Tensor, layer: nn.Module, scale: float = 1.0, output_is_untouched: bool = False
    ) -> torch.Tensor:
        """Return y, as `layer` gave it for x, with `scale` times the delta added; its shape and dtype are those of y.

        output_is_untouched: y is the layer's own, and no hook has seen it.
        """
        delta = LayerDelta(
            *self._factors(self.in_graph),
            self.scale * scale,
            layout=self.layout,
            dropout=self.dropout if self.training else 0.0,
            output_is_untouched=output_is_untouched,
        )
        y = self.kind.add(layer, y, x, delta)
        if self.magnitude_or_none is None:
            return y
        gain = dora.spread(
            dora.gain(self.in_graph.get("magnitude", self.magnitude), self._row_norms(layer, delta)),
            self.layout,
        )
        bias = layer.bias
        if self.kind.cut == "out":
            gain = self.kind.across_ranks(layer, gain)
            bias = None if bias is None else self.kind.across_ranks(layer, bias)
        return dora.rescale(y, gain, bias, self.kind.channel_dim(layer))

    def merged_weight(self, layer: nn.Module, scale: float = 1.0) -> torch.Tensor:
        """Return this rank's part of the weight with `scale` times the delta in it, see `merging.merged_weight`."""
        return merged_weight(whole(layer.weight), self.kind, self.layout, self.delta(scale), self.magnitude_or_none)

    def _row_norms(self, layer: nn.Module, delta: Delta | None) -> torch.Tensor:
        matrix = self.kind.matrix(whole(layer.weight.detach()))
        return dora.row_norms(matrix, self.layout, delta, sum_over_ranks=self.kind.cut == "in")

    def extra_repr(self) -> str:
        """Return what `repr` of a model shows of the adapter: layer, rank, scale and slots."""
        slots = f", slots={self.slots}" if self.slots else ""
        return f"{self.name}, r={self.rank}, scale={self.scale:g}{slots}"
