"""The arithmetic of one adapted linear, as one autograd Function and as a plain reference.

Shapes: y (tokens, out), x (tokens, in), A (slots * r, in), B (adapted rows of y, r), S = x A^T (tokens, slots * r).
A linear such as fused q/k/v has several slots: slot i owns columns [i r, (i + 1) r) of S and a range of y's columns.

    forward     S = (x * keep) A^T            y_slot += scale S_slot B_slot^T
    backward    dS_slot = scale dy_slot B_slot    dB_slot = scale dy_slot^T S_slot
                dA = dS^T (x * keep)              dx = (dS A) * keep        dy passes through unchanged

Model parallelism: a column-parallel linear sums dS over the ranks (each sees its own part of y), a row-parallel one
sums S (each sees its own part of x). Both are tokens x r: no other communication.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sat_lora._sat import mpu


@dataclass(frozen=True)
class DeltaLayout:
    """Where a delta goes and what is summed over the model-parallel ranks; the same for every call of one linear."""

    slots: tuple[tuple[int, int], ...]  # ranges of y's columns (of this rank), ascending
    width: int  # y's columns, of this rank
    kind: str = "linear"  # of `kinds`: "column" and "row" sum over the model-parallel ranks

    def pieces(self, rank: int):
        """For each slot: its columns of y, its rows of B, its columns of S."""
        row = 0
        for number, (start, stop) in enumerate(self.slots):
            yield slice(start, stop), slice(row, row + stop - start), slice(number * rank, (number + 1) * rank)
            row += stop - start

    def gaps(self):
        """Ranges of columns that get no delta."""
        edges = [0, *(edge for slot in self.slots for edge in slot), self.width]
        return [slice(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]


def _sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    group = mpu.get_model_parallel_group()
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


class _AddDelta(torch.autograd.Function):
    """S and dS are held transposed, (slots * r, tokens): a product that ends in r columns takes a CPU up to nine times
    as long as its transpose.
    """

    @staticmethod
    def forward(ctx, y, x, weight, a, b, keep, scale: float, layout: DeltaLayout):
        rank, a_, b_ = b.shape[1], a.to(x.dtype), b.to(x.dtype)
        s_t = a_ @ (x if keep is None else x * keep).T
        if layout.kind == "row":
            s_t = _sum_over_ranks(s_t)
        out = y.clone() if weight is None else y.detach()
        for columns, rows, ranks in layout.pieces(rank):
            out[:, columns].addmm_(s_t[ranks].T, b_[rows].T, alpha=scale)
        need_x, _, need_a, need_b = ctx.needs_input_grad[1:5]
        ctx.save_for_backward(
            x if need_a else None,  # LoRA-FA freezes A: backward does without x
            s_t if need_b else None,
            a if need_x else None,
            b if need_x or need_a else None,
            keep if need_x or need_a else None,
            weight if need_x else None,
        )
        ctx.scale, ctx.layout, ctx.shape_of_b, ctx.dtypes = scale, layout, b.shape, (a.dtype, b.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, s_t, a, b, keep, weight = ctx.saved_tensors
        need_y, need_x, _, need_a, need_b = ctx.needs_input_grad[:5]
        pieces = list(ctx.layout.pieces(ctx.shape_of_b[1]))
        dx = da = db = None
        if need_b:
            db = dy.new_empty(ctx.shape_of_b, dtype=ctx.dtypes[1])
            for columns, rows, ranks in pieces:
                db[rows] = (s_t[ranks] @ dy[:, columns]).T.mul_(ctx.scale)
        if need_x or need_a:
            ds_t, b = dy.new_empty(len(pieces) * ctx.shape_of_b[1], dy.shape[0]), b.to(dy.dtype)
            for columns, rows, ranks in pieces:
                torch.mm(b[rows].T, dy[:, columns].T, out=ds_t[ranks])
            ds_t.mul_(ctx.scale)
            if need_x and weight is not None:
                dx = _into(dy @ weight, ds_t, a, keep)
                dx = _sum_over_ranks(dx) if ctx.layout.kind == "column" else dx
            if ctx.layout.kind == "column":
                ds_t = _sum_over_ranks(ds_t)
            if need_x and weight is None:
                dx = ds_t.T @ a.to(dy.dtype)
                dx = dx if keep is None else dx.mul_(keep)
            if need_a:
                da = (ds_t @ (x if keep is None else x * keep)).to(ctx.dtypes[0])
        return dy if need_y else None, dx, None, da, db, None, None, None


def _into(dx: torch.Tensor, ds_t: torch.Tensor, a: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """dx (tokens, in) with (dS A) * keep added in place."""
    a = a.to(dx.dtype)
    return dx.addmm_(ds_t.T, a) if keep is None else torch.addcmul(dx, ds_t.T @ a, keep, out=dx)


def add_delta(y, x, a, b, keep, scale: float, layout: DeltaLayout, weight: torch.Tensor | None = None) -> torch.Tensor:
    """y with the low-rank delta of x added.

    Without a weight y is left as it is and passes its gradient on. With one, y = x W^T is taken over: the delta goes
    into y in place, what y came from gets no gradient, and that of x, dy W + dS A, is made in one buffer, which saves
    autograd a pass over two more.

    y (..., out) and x (..., in) in one dtype; A and B may have another and are cast, x never is.
    keep: None, or a (tokens, in) mask, 1 for the inputs that dropout left; its 1 / (1 - p) belongs into `scale`.
    """
    rows = y.reshape(-1, y.shape[-1])
    # Flattened out here, since what a Function returns as a view cannot be changed in place by the model.
    rows = rows if weight is None else rows.detach()
    return _AddDelta.apply(rows, x.reshape(-1, x.shape[-1]), weight, a, b, keep, scale, layout).view(y.shape)


def dropout_mask(x: torch.Tensor, probability: float) -> tuple[torch.Tensor, float]:
    """(keep (tokens, in) of ones and zeros in uint8, the share of ones that is drawn for).

    From 16 random bits each, which is a quarter of the time of `bernoulli_` on a CPU; the probability is rounded to
    2^-16. Multiplying by uint8 takes a CPU a third of the time of multiplying by bool.
    """
    count, dropped = x.numel(), round(probability * 2**16)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    keep = (bits.view(torch.int16)[:count] >= dropped - 2**15).view(torch.uint8)
    return keep.view(-1, x.shape[-1]), 1 - dropped / 2**16


def add_delta_reference(y, x, a, b, keep, scale: float, layout: DeltaLayout) -> torch.Tensor:
    """The same in plain autograd and SAT's communication functions: slow, and easy to read."""
    if keep is not None:
        x = x * keep.view(x.shape)
    s = F.linear(x, a.to(x.dtype))
    if layout.kind == "row":
        s = mpu.reduce_from_model_parallel_region(s)
    elif layout.kind == "column":
        s = mpu.copy_to_model_parallel_region(s)
    parts = {columns.start: y[..., columns] for columns in layout.gaps()}
    for columns, rows, ranks in layout.pieces(b.shape[1]):
        parts[columns.start] = y[..., columns] + scale * F.linear(s[..., ranks], b[rows].to(x.dtype))
    return torch.cat([parts[start] for start in sorted(parts)], dim=-1)
