"""Where the delta of a linear goes: its slots as columns of y, rows of B and columns of S, and the views of them.

Shapes are those of `low_rank`: y (tokens, out), B (adapted rows of y, r), S (tokens, slots * r).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class SlotRun(NamedTuple):
    """A run of slots of equal width at equal distances, which one batched product serves."""

    start: int  # first column of y
    width: int  # columns of each slot
    distance: int  # columns from the start of a slot to that of the next
    slots: int  # how many
    row: int  # first row of B
    slot: int  # number of the first

    # Each of these makes its view in one call, since every call costs host time, and names an offset only where it is
    # another than the tensor's own.

    def columns(self, y: torch.Tensor) -> torch.Tensor:
        """Return the slots' columns of y (tokens, out): a view (slots, tokens, width)."""
        per_token, per_column = y.stride()
        offset = y.storage_offset() + self.start * per_column if self.start else None
        strides = (self.distance * per_column, per_token, per_column)
        return y.as_strided((self.slots, y.shape[0], self.width), strides, offset)

    def columns_transposed(self, y: torch.Tensor) -> torch.Tensor:
        """Return the slots' columns of y (tokens, out), transposed: a view (slots, width, tokens)."""
        per_token, per_column = y.stride()
        offset = y.storage_offset() + self.start * per_column if self.start else None
        strides = (self.distance * per_column, per_column, per_token)
        return y.as_strided((self.slots, self.width, y.shape[0]), strides, offset)

    def rows_transposed(self, b: torch.Tensor) -> torch.Tensor:
        """Return the slots' rows of B (adapted rows, r), which is contiguous: a view (slots, r, width)."""
        rank = b.shape[1]
        width = self.width
        offset = b.storage_offset() + self.row * rank if self.row else None
        return b.as_strided((self.slots, rank, width), (width * rank, 1, rank), offset)

    def ranks(self, s: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the slots' columns of S (tokens, slots * r), which is contiguous: a view (slots, tokens, r)."""
        tokens, all_ranks = s.shape
        offset = s.storage_offset() + self.slot * rank if self.slot else None
        return s.as_strided((self.slots, tokens, rank), (rank, all_ranks, 1), offset)


@dataclass(frozen=True)
class DeltaLayout:
    """Where a delta goes and what is summed over the model-parallel ranks; the same for every call of one linear."""

    slots: tuple[tuple[int, int], ...]  # ranges of y's columns (of this rank), ascending
    width: int  # y's columns, of this rank
    kind: str = "linear"  # of `layers`: "column" and "row" sum over the model-parallel ranks
    mp_size: int = 1  # model-parallel ranks

    def pieces(self, rank: int) -> Iterator[tuple[slice, slice, slice]]:
        """Yield for each slot the slices of its columns of y, its rows of B and its columns of S."""
        row = 0
        for number, (start, stop) in enumerate(self.slots):
            yield slice(start, stop), slice(row, row + stop - start), slice(number * rank, (number + 1) * rank)
            row += stop - start

    def gaps(self) -> list[slice]:
        """Return the ranges of y's columns that get no delta."""
        edges = [0, *(edge for slot in self.slots for edge in slot), self.width]
        return [slice(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]

    @cached_property
    def is_whole(self) -> bool:
        """Whether one slot has all columns."""
        return self.slots == ((0, self.width),)

    @cached_property
    def runs(self) -> tuple[SlotRun, ...]:
        """The slots in as few runs as their widths and distances allow."""
        runs: list[SlotRun] = []
        row = 0
        for number, (start, stop) in enumerate(self.slots):
            last = runs[-1] if runs else None
            if (
                last is not None
                and last.width == stop - start
                and (last.slots == 1 or start == last.start + last.slots * last.distance)
            ):
                distance = last.distance if last.slots > 1 else start - last.start
                runs[-1] = last._replace(distance=distance, slots=last.slots + 1)
            else:
                runs.append(SlotRun(start, stop - start, stop - start, 1, row, number))
            row += stop - start
        return tuple(runs)

    @cached_property
    def sums_s(self) -> bool:
        """Whether S is summed over the model-parallel ranks."""
        return self.kind == "row" and self.mp_size > 1

    @cached_property
    def sums_ds(self) -> bool:
        """Whether dS, and with it dx, is summed over the model-parallel ranks."""
        return self.kind == "column" and self.mp_size > 1
