"""The kinds of layer that take a delta: how each sees its weight as a matrix W (out, in), and how it adds s B A x.

kind         layer                    W from the weight         model parallelism cuts
column       ColumnParallelLinear     as it is                  out, within each of q, k, v
row          RowParallelLinear        as it is                  in
linear       nn.Linear                as it is                  nothing
conv         nn.Conv1d, 2d, 3d        (out, in / groups * k)    nothing
embedding    nn.Embedding             transposed: (dim, ids)    nothing
vocab        VocabParallelEmbedding   transposed: (dim, ids)    in
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from sat_lora._sat import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, mpu
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.lora.deltas.low_rank import RandomDropout, add_delta
from sat_lora.parallel.sharding import model_parallel_layout
from sat_lora.quantized.layers import own_weight


@dataclass(frozen=True, kw_only=True)
class LayerDelta(Delta):
    """The delta of all slots, of this rank, as a call of the layer adds it to its output: scale * B A x."""

    layout: DeltaLayout
    dropout: float = 0.0  # probability, 0 outside of training
    output_is_untouched: bool = False  # it is as the layer made it, no hook having seen it


class Kind:
    """How a kind of layer takes a delta: its name and classes, and W with what it adds where that is not as here.

    Here y is some product of x (..., in) with W (out, in). `kinds` registers it.
    """

    name: str
    """The name in adapter files."""
    layers: tuple[type, ...]
    """The classes of such layers; a subclass of one is of this kind as well, if it has none of its own."""
    cut: str | None = None
    """What model parallelism cuts in W: "out", "in" or nothing."""
    is_linear = True
    """Whether "all-linear" means it."""
    is_product = False
    """Whether a layer of one of these very classes gives x W^T + bias and nothing else.

    Its delta may then be added without calling it.
    """
    is_embedding = False
    """Whether x holds whole numbers that pick columns of W."""

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as W (out, in); a view."""
        return weight

    def channel_dim(self, layer: nn.Module) -> int:
        """Return the dimension of the output that has `out` entries."""
        return -1

    def across_ranks(self, layer: nn.Module, per_channel: torch.Tensor) -> torch.Tensor:
        """Return a vector as long as the layer's output is wide, of one that has an entry per local row of W."""
        return per_channel

    def add(self, layer: nn.Module, y: torch.Tensor, x: torch.Tensor, delta: LayerDelta) -> torch.Tensor:
        """Return the layer's output y (..., out) for x (..., in), with the delta added."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(y.dtype)  # what autocast did to the layer's own x
        fuses = delta.output_is_untouched and y.is_contiguous() and self.can_fuse(layer, x)
        dropout = RandomDropout(delta.dropout) if delta.dropout > 0 else None
        with torch.autocast(x.device.type, enabled=False):
            weight = layer.weight if fuses else None
            return add_delta(y, x, delta.a, delta.b, dropout, delta.scale, delta.layout, weight)

    def can_fuse(self, layer: nn.Module, x: torch.Tensor) -> bool:
        """Return whether y is x W^T as it stands, W frozen and whole: one Function then has the gradient of both."""
        if not self.is_product or type(layer) not in self.layers:
            return False  # a subclass may do anything else
        weight = own_weight(layer)
        if weight is None or hasattr(weight, "ds_id") or weight.dtype != x.dtype:
            return False  # weight norm and the like; ZeRO-3, which gathers W for its own graph alone
        return not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


class Linear(Kind):
    """How an nn.Linear takes a delta."""

    name = "linear"
    layers: tuple[type, ...] = (nn.Linear,)
    is_product = True


class Column(Linear):
    """How a column-parallel linear takes a delta: each rank makes that of its own columns of y, gathered where y is."""

    name = "column"
    layers = (ColumnParallelLinear,)
    cut = "out"

    def across_ranks(self, layer: nn.Module, per_channel: torch.Tensor) -> torch.Tensor:
        gathers = layer.gather_output and model_parallel_layout()[1] > 1
        return mpu.gather_from_model_parallel_region(per_channel) if gathers else per_channel

    def add(self, layer: nn.Module, y: torch.Tensor, x: torch.Tensor, delta: LayerDelta) -> torch.Tensor:
        if layer.gather_output and model_parallel_layout()[1] > 1:
            own_columns = y.new_zeros(*y.shape[:-1], delta.layout.width)
            delta = replace(delta, output_is_untouched=False)
            return y + mpu.gather_from_model_parallel_region(super().add(layer, own_columns, x, delta))
        return super().add(layer, y, x, delta)


class Row(Linear):
    """How a row-parallel linear takes a delta: S is summed over the ranks, and each adds the whole delta."""

    name = "row"
    layers = (RowParallelLinear,)
    cut = "in"

    def add(self, layer: nn.Module, y: torch.Tensor, x: torch.Tensor, delta: LayerDelta) -> torch.Tensor:
        x = x if layer.input_is_parallel else mpu.scatter_to_model_parallel_region(x)  # its backward gathers
        return super().add(layer, y, x, delta)


class Convolution(Kind):
    """How a convolution takes a delta: A is one like the layer's own with r output channels, B one of size 1.

    With groups, each group runs the same A over its own channels and has its own rows of B, so that the delta of W is
    B A here too.
    """

    name = "conv"
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    is_linear = False

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def channel_dim(self, layer: nn.Module) -> int:
        return -1 - len(layer.kernel_size)

    def add(self, layer: nn.Module, y: torch.Tensor, x: torch.Tensor, delta: LayerDelta) -> torch.Tensor:
        kernel = layer.weight.shape[1:]
        groups = layer.groups
        ones = (1,) * len(layer.kernel_size)
        x = F.dropout(x, delta.dropout) if delta.dropout > 0 else x
        a = delta.a.to(y.dtype).view(-1, *kernel).repeat(groups, *(1 for _ in kernel))
        s = layer._conv_forward(x, a, None)  # knows stride, padding mode and dilation
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1]
        return y + delta.scale * convolve(s, delta.b.to(y.dtype).view(*delta.b.shape, *ones), groups=groups)


class Embedding(Kind):
    """How an nn.Embedding takes a delta: the ids pick columns of A, which B makes as long as the layer's rows."""

    name = "embedding"
    layers = (nn.Embedding,)
    is_linear = False
    is_embedding = True

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def add(self, layer: nn.Module, y: torch.Tensor, x: torch.Tensor, delta: LayerDelta) -> torch.Tensor:
        s = F.embedding(x, delta.a.T, layer.padding_idx)
        return y + delta.scale * F.linear(s, delta.b).to(y.dtype)


class VocabEmbedding(Embedding):
    """How a vocabulary-parallel embedding takes a delta: each rank looks up the ids that it holds.

    An id that nobody holds gives zeros, as in the layer itself.
    """

    name = "vocab"
    layers = (VocabParallelEmbedding,)
    cut = "in"

    def add(self, layer: nn.Module, y: torch.Tensor, x: torch.Tensor, delta: LayerDelta) -> torch.Tensor:
        elsewhere = (x < layer.vocab_start_index) | (x >= layer.vocab_end_index)
        s = F.embedding((x - layer.vocab_start_index).masked_fill(elsewhere, 0), delta.a.T)
        s = mpu.reduce_from_model_parallel_region(s.masked_fill(elsewhere.unsqueeze(-1), 0))
        return y + delta.scale * F.linear(s, delta.b).to(y.dtype)
