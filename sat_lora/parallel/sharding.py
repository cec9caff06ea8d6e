"""How a full tensor is cut over the model-parallel ranks, for base weights and adapters alike.

SAT keeps this knowledge inside each parallel layer's `partition` and `merge`, which work on a whole model at once.
Here it is a value that can be asked for one parameter, so that a rank can cut its own slice from a mapped file,
draw its own slice of an initial value, or join the slices for a file.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sat_lora._sat import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, mpu


@dataclass(frozen=True)
class Sharding:
    """How a tensor is cut: along `dim` (None: the same on every rank), within each of several blocks.

    `blocks` are the relative sizes of the blocks along `dim`, for instance (1, 1, 1) for a fused q/k/v weight:
    every rank holds its part of q, then its part of k, then its part of v.
    """

    dim: int | None = None
    blocks: tuple[int, ...] = (1,)

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """Return the part of `full` that `rank` of `size` ranks holds; a view where there is one block."""
        if self.dim is None or size == 1:
            return full
        parts = [block.chunk(size, self.dim)[rank] for block in self._split(full)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def unshard(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """Return the full tensor, from the parts of all ranks in rank order."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        by_rank = [self._split(shard) for shard in shards]
        return torch.cat([part for block in zip(*by_rank) for part in block], self.dim)

    def pieces(self, length: int, saved: int, rank: int, size: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield (saved rank, where in its part, where in ours) of what the part of `rank` of `size` is put together.

        The slices run along the cut dimension, of `length` in full; `saved` ranks hold the other parts. Neither number
        of ranks has to divide the other; both have to divide each block.
        """
        if self.dim is None:
            yield rank * saved // size, slice(0, length), slice(0, length)
            return
        edge = 0
        for block in self.blocks:
            whole = length * block // sum(self.blocks)
            own_size = whole // size
            saved_size = whole // saved
            for saved_rank in range(saved):
                start = max(own_size * rank, saved_size * saved_rank)
                stop = min(own_size * (rank + 1), saved_size * (saved_rank + 1))
                if start < stop:
                    source = edge // saved - saved_size * saved_rank
                    target = edge // size - own_size * rank
                    yield saved_rank, slice(start + source, stop + source), slice(start + target, stop + target)
            edge += whole

    def place(self, index: torch.Tensor, length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (rank of `size` that holds it, where in its part), each of the shape of `index`, for places in full.

        `index`: places along the cut dimension, which has `length` entries in full; `size` has to divide each block.
        """
        owners = torch.zeros_like(index)
        local = index.clone()
        edge = 0
        for block in self.blocks:
            whole = length * block // sum(self.blocks)
            part = whole // size
            inside = (index >= edge) & (index < edge + whole)
            owners = torch.where(inside, (index - edge) // part, owners)
            local = torch.where(inside, (index - edge) % part + edge // size, local)
            edge += whole
        return owners, local

    def fill(
        self,
        target: torch.Tensor,
        parts: Mapping[int, torch.Tensor],
        *,
        saved: int,
        rank: int,
        size: int,
        rows: range | None = None,
    ) -> None:
        """Copy into `target`, the part of `rank` of `size`, from `parts`: by saved rank, of `saved`, those needed.

        It goes slice by slice, so that of mapped parts no more is read than is copied. rows: leave the others as they
        are.
        """
        rows = rows or range(len(target))
        along = self.dim or 0
        for saved_rank, source_slice, target_slice in self.pieces(
            target.shape[along] * (1 if self.dim is None else size), saved, rank, size
        ):
            source = parts[saved_rank].narrow(along, source_slice.start, source_slice.stop - source_slice.start)
            place = target.narrow(along, target_slice.start, target_slice.stop - target_slice.start)
            skipped = target_slice.start if along == 0 else 0
            first = max(rows.start - skipped, 0)
            last = min(rows.stop - skipped, len(place))
            if first < last:
                place[first:last].copy_(source[first:last])

    def full_shape(self, local: torch.Size, size: int) -> tuple[int, ...]:
        """Return the shape of the full tensor, from the shape that one of `size` ranks holds."""
        return tuple(n * size if d == self.dim else n for d, n in enumerate(local))

    def saved_shape(self, local: torch.Size, size: int, saved: int) -> tuple[int, ...] | None:
        """Return the shape on one of `saved` ranks of what is `local` on one of `size`; None if it cannot be cut so."""
        full = self.full_shape(local, size)
        if self.dim is not None and full[self.dim] % (saved * sum(self.blocks)):
            return None
        return tuple(n // saved if d == self.dim else n for d, n in enumerate(full))

    def _split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = tensor.shape[self.dim]
        total = sum(self.blocks)
        return tuple(tensor.split([size * block // total for block in self.blocks], self.dim))


REPLICATED = Sharding()


def blocks_of(linear: nn.Module) -> tuple[int, ...]:
    """Return the relative sizes of the blocks in a SAT column-parallel weight (its `stride`): (1, 1, 1) for q, k, v.

    They are in lowest terms, for SAT counts the heads of a rank where fewer are of keys: (4, 1, 1) at any size.
    """
    stride = linear.stride
    if isinstance(stride, int):
        return (1,) * stride
    return tuple(size // math.gcd(*stride) for size in stride)


def sharding_of(module: nn.Module, parameter: str) -> Sharding:
    """Return how SAT cuts `module`'s own parameter (or buffer) of that name."""
    if isinstance(module, ColumnParallelLinear):
        return Sharding(0, blocks_of(module))
    if isinstance(module, RowParallelLinear) and parameter == "weight":
        return Sharding(1)
    if isinstance(module, VocabParallelEmbedding):
        return Sharding(0)
    return REPLICATED


def model_parallel_layout() -> tuple[int, int]:
    """Return (rank, size) of this process in its model-parallel group; (0, 1) when SAT has not set one up."""
    if not mpu.model_parallel_is_initialized():
        return 0, 1
    return mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()


def mark_sharded(parameter: nn.Parameter, sharding: Sharding) -> nn.Parameter:
    """Return the parameter, with the flags that SAT (`model_parallel`) and DeepSpeed (`tensor_model_parallel`) read.

    They are set where `sharding` cuts it.
    """
    if sharding.dim is not None:
        parameter.model_parallel = True
        parameter.tensor_model_parallel = True
    return parameter


def over_model_parallel(local: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """Return the full tensor, from every rank's part of it; every model-parallel rank has to call it."""
    _, size = model_parallel_layout()
    if size == 1 or sharding.dim is None:
        return local
    shards = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
    torch.distributed.all_gather(shards, local.contiguous(), group=mpu.get_model_parallel_group())
    return sharding.unshard(shards)


def gathered(parameters: Iterable[nn.Parameter], *, write: bool = False) -> AbstractContextManager[object]:
    """Return a context in which parameters that ZeRO-3 has partitioned are there, and what is written to them stays.

    Every rank has to enter it, and all have to write the same.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[object]
    context = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None)
    return context
