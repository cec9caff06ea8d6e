"""What a delta does to large tensors on a GPU, in Triton: each of them is read once and written once.

add_slots       y_slot += scale S_slot B_slot^T, in place
project         S = (x * mask) A^T
spread          (dS A) * mask
gradient_of_a   dA = scale dS^T (x * mask), in parts of the rows that are summed in a fixed order

`mask` is nowhere in memory: each kernel draws it anew from the seed, row and column. Products are summed in float32 and
rounded once. Importing this imports triton, so it is imported where a kernel is launched.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sat_lora._triton import device_of
from sat_lora.lora.deltas.layout import DeltaLayout

ROUNDS = tl.constexpr(7)  # of Philox 4x32: the fewest that pass BigCrush (Salmon et al., 2011, table 2)


class Blocks(NamedTuple):
    """The tile of the large tensor that a program works on at a time."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2  # tiles on their way from memory


# float32 is multiplied without tensor cores, which takes registers.
ADD = {2: Blocks(32, 256), 4: Blocks(32, 64)}  # by the bytes of an element
PROJECT = {2: Blocks(16, 256, stages=3), 4: Blocks(16, 32)}
SPREAD = {2: Blocks(32, 256), 4: Blocks(32, 64)}
GRADIENT = {2: Blocks(32, 256, stages=3), 4: Blocks(16, 64)}
MOST_RANKS = 64  # columns of S that a program takes at a time
PROGRAMS = 512  # into which `gradient_of_a` divides its work; a constant, so that every GPU adds in the same order
VARYING = ("rows", "rows_of_part", "dropped", "columns_of_blocks")  # of which no kernel is compiled for some values


@triton.jit
def kept(seed, dropped, row, first_column, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads its annotations
    """Return whether dropout keeps (rows, COLUMNS) elements. Eight neighbours have 16 bits each of one draw."""
    group = first_column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    zero = row[:, None] * 0 + group * 0
    w0, w1, w2, w3 = tl.philox(seed, row[:, None] + zero, group + zero, zero, zero, ROUNDS)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(bits & 0xFFFF, bits >> 16).to(tl.int32) >= dropped


@triton.jit(do_not_specialize=VARYING)
def product_kernel(  # type: ignore[no-untyped-def]  # Triton reads its annotations
    out, left, right, seed, scale, dropped, rows, width, ranks, columns_of_blocks, distance,
    out_row, left_row, left_rank, left_slot, right_rank, right_column, right_slot,
    ADDS: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Compute out (rows, width) = [out +] scale left (rows, ranks) right (ranks, width) [* mask], per slot."""
    block = tl.program_id(0) % columns_of_blocks
    blocks_of_slot = tl.cdiv(width, COLUMNS)
    slot = block // blocks_of_slot
    first_column = block % blocks_of_slot * COLUMNS
    row = tl.program_id(0) // columns_of_blocks * ROWS + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    far_row = row.to(tl.int64)[:, None]
    left += slot * left_slot
    right += slot.to(tl.int64) * right_slot
    inside = (row[:, None] < rows) & (column[None, :] < width)
    out += slot * distance + far_row * out_row + column[None, :]
    if ADDS:
        before = tl.load(out, inside, other=0.0)  # on its way during the product
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        rank = chunk * RANKS + tl.arange(0, RANKS)
        of_left = (row[:, None] < rows) & (rank[None, :] < ranks)
        of_right = (rank[:, None] < ranks) & (column[None, :] < width)
        left_tile = tl.load(left + far_row * left_row + rank.to(tl.int64)[None, :] * left_rank, of_left, other=0.0)
        right_tile = tl.load(right + rank[:, None] * right_rank + column[None, :] * right_column, of_right, other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
    if ADDS:
        total = before.to(tl.float32) + scale * total
    if DROPS:
        total = tl.where(kept(tl.load(seed), dropped, row, first_column, COLUMNS), total, 0.0)
    tl.store(out, total.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=VARYING)
def project_kernel(  # type: ignore[no-untyped-def]  # Triton reads its annotations
    s, x, a, seed, dropped, rows, columns, ranks, x_row, x_column, a_rank, a_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Compute s (rows, ranks) = (x (rows, columns) * mask) a (ranks, columns)^T."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    far_row = row.to(tl.int64)[:, None]
    key = tl.load(seed)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for first_column in range(0, columns, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        of_x = (row[:, None] < rows) & (column[None, :] < columns)
        of_a = (column[:, None] < columns) & (rank[None, :] < ranks)
        x_tile = tl.load(x + far_row * x_row + column[None, :] * x_column, of_x, other=0.0)
        a_tile = tl.load(a + rank[None, :] * a_rank + column[:, None] * a_column, of_a, other=0.0)
        x_tile = tl.where(kept(key, dropped, row, first_column, COLUMNS), x_tile, 0.0)
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
    inside = (row[:, None] < rows) & (rank[None, :] < ranks)
    tl.store(s + far_row * ranks + rank[None, :], total.to(s.dtype.element_ty), inside)


@triton.jit(do_not_specialize=VARYING)
def gradient_of_a_kernel(  # type: ignore[no-untyped-def]  # Triton reads its annotations
    parts, ds, x, seed, scale, dropped, rows, columns, ranks, rows_of_part, ds_row, ds_rank, x_row, x_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Compute parts (part, ranks, columns) = scale ds^T (x * mask) in float32, each over its own rows."""
    first_column = tl.program_id(0) * COLUMNS
    part = tl.program_id(1)
    column = first_column + tl.arange(0, COLUMNS)
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    key = tl.load(seed)
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for first_row in range(part * rows_of_part, tl.minimum((part + 1) * rows_of_part, rows), ROWS):
        row = first_row + tl.arange(0, ROWS)
        far_row = row.to(tl.int64)
        of_x = (row[:, None] < rows) & (column[None, :] < columns)
        of_ds = (rank[:, None] < ranks) & (row[None, :] < rows)
        x_tile = tl.load(x + far_row[:, None] * x_row + column[None, :] * x_column, of_x, other=0.0)
        ds_tile = tl.load(ds + rank.to(tl.int64)[:, None] * ds_rank + far_row[None, :] * ds_row, of_ds, other=0.0)
        x_tile = tl.where(kept(key, dropped, row, first_column, COLUMNS), x_tile, 0.0)
        total = tl.dot(ds_tile, x_tile, total, input_precision="ieee")
    inside = (rank[:, None] < ranks) & (column[None, :] < columns)
    target = parts + (part.to(tl.int64) * ranks + rank[:, None]) * columns + column[None, :]
    tl.store(target, scale * total, inside)


def add_slots(
    y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float, layout: DeltaLayout, blocks: Blocks | None = None
) -> None:
    """Add scale S_slot B_slot^T to y_slot, in place; y (tokens, out), S (tokens, slots * r), B (adapted rows, r)."""
    ranks = b.shape[1]
    b_row, b_rank = b.stride()
    blocks = blocks or ADD[y.itemsize]
    for run in layout.runs:
        out = y[:, run.start :] if run.start else y  # a view costs the host microseconds
        left = s[:, run.slot * ranks :] if run.slot else s
        right = b[run.row :] if run.row else b
        shape = y.shape[0], run.width, run.slots
        distances = run.distance, ranks * s.stride(1), run.width * b_row
        _product(out, left, right, (b_rank, b_row), ranks, shape, distances, blocks, scale=scale)
    torch.autograd.graph.increment_version(y)  # as torch's own in-place operations do


def project(
    x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, dropped: int, blocks: Blocks | None = None
) -> torch.Tensor:
    """Return S (tokens, slots * r) of x (tokens, in), with `dropped` of 2^16 elements zeroed, and A (slots * r, in)."""
    rows, columns = x.shape
    ranks = a.shape[0]
    blocks = blocks or PROJECT[x.itemsize]
    s = x.new_empty(rows, ranks)
    chunk = _chunk(ranks)
    if s.numel():
        with device_of(x):
            project_kernel[(_parts(rows, blocks.rows), _parts(ranks, chunk))](
                s, x, a, seed, dropped, rows, columns, ranks, *x.stride(), *a.stride(),
                ROWS=blocks.rows, COLUMNS=blocks.columns, RANKS=chunk, num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
    return s


def spread(
    ds: torch.Tensor, a: torch.Tensor, seed: torch.Tensor, dropped: int, blocks: Blocks | None = None
) -> torch.Tensor:
    """Return dS A (tokens, in), zero where `project` zeroes x."""
    ranks, columns = a.shape
    dx = ds.new_empty(ds.shape[0], columns)
    shape = ds.shape[0], columns, 1
    blocks = blocks or SPREAD[dx.itemsize]
    _product(dx, ds, a, a.stride(), ranks, shape, (0, 0, 0), blocks, seed=seed, dropped=dropped)
    return dx


def gradient_of_a(
    ds: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, dropped: int, scale: float, blocks: Blocks | None = None
) -> torch.Tensor:
    """Return scale dS^T x (slots * r, in), with x zeroed as `project` does; the same bits in every call."""
    rows, columns = x.shape
    ranks = ds.shape[1]
    blocks = blocks or GRADIENT[x.itemsize]
    chunk = _chunk(ranks)
    across = _parts(columns, blocks.columns)
    down = _parts(ranks, chunk)
    count = max(1, min(PROGRAMS // (across * down), _parts(rows, blocks.rows)))
    rows_of_part = _parts(_parts(rows, count), blocks.rows) * blocks.rows
    parts = x.new_empty(count, ranks, columns, dtype=torch.float32)
    with device_of(x):
        gradient_of_a_kernel[(across, count, down)](
            parts, ds, x, seed, scale, dropped, rows, columns, ranks, rows_of_part, *ds.stride(), *x.stride(),
            ROWS=blocks.rows, COLUMNS=blocks.columns, RANKS=chunk, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return parts.sum(0).to(x.dtype)


def _product(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    right_strides: tuple[int, ...],
    ranks: int,
    shape: tuple[int, int, int],
    distances: tuple[int, int, int],
    blocks: Blocks,
    *,
    scale: float = 1.0,
    seed: torch.Tensor | None = None,
    dropped: int = 0,
) -> None:
    """Add a product to `out` where there is no seed; with one, write the product with dropout to it.

    right_strides: from one rank of `right` to the next, and from one column. shape: (rows, width, slots). distances:
    from one slot to the next, in out, left and right.
    """
    rows, width, slots = shape
    distance, left_slot, right_slot = distances
    columns_of_blocks = _parts(width, blocks.columns) * slots
    chunk = _chunk(ranks)
    if rows and columns_of_blocks:
        with device_of(out):
            product_kernel[(_parts(rows, blocks.rows) * columns_of_blocks,)](
                out, left, right, seed, scale, dropped, rows, width, ranks, columns_of_blocks, distance,
                out.stride(0), *left.stride(), left_slot, *right_strides, right_slot,
                ADDS=seed is None, DROPS=seed is not None, ROWS=blocks.rows, COLUMNS=blocks.columns,
                RANKS=chunk, CHUNKS=_parts(ranks, chunk), num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip


def _parts(whole: int, part: int) -> int:
    """Return how many parts of that size cover the whole; `triton.cdiv` costs the host microseconds."""
    return -(-whole // part)


def _chunk(ranks: int) -> int:
    """Return a power of two, which `tl.arange` wants, from 16 on, which `tl.dot` does."""
    return min(MOST_RANKS, max(16, 1 << (ranks - 1).bit_length()))
