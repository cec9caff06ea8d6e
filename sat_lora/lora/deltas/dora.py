"""DoRA (arXiv 2402.09353): a weight as the length of its rows times their direction, and only the lengths scale.

W' = g (W + s B A)     g_i = m_i / |(W + s B A)_i|     m trained, m = |W_i| at first, |.| without gradient
y' = g (y - bias + s B A x) + bias
"""

import torch

from sat_lora._sat import mpu
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.parallel.sharding import model_parallel_layout


@torch.no_grad()
def row_norms(
    matrix: torch.Tensor,
    layout: DeltaLayout,
    delta: Delta | None = None,
    *,
    sum_over_ranks: bool = False,
) -> torch.Tensor:
    """Return |(W + s B A)_i| for every adapted row: (adapted rows,) in float64, so that no cut shows in rounded values.

    matrix: W (out, in) of this rank; delta: of all slots, or None for |W_i|;
    sum_over_ranks: the columns of W are cut over the model-parallel ranks. The product B A is never formed:

        |W + s B A|^2 = |W|^2 + 2 s (W A^T, B) + s^2 (B A A^T, B)     (., .) row by row
    """
    dtype = torch.float64
    rank = delta.rank if delta is not None else 0
    squares = []
    for rows, b_rows, a_rows in layout.pieces(rank):
        w = matrix[rows]
        square = torch.linalg.vector_norm(w, dim=1, dtype=dtype).square()
        if delta is not None:
            a = delta.a[a_rows]
            b = delta.b[b_rows].to(dtype)
            scale = delta.scale
            cross = w @ a.to(w.dtype).T  # (rows, r)
            square += 2 * scale * (cross.to(dtype) * b).sum(1)
            a = a.to(dtype)
            square += scale**2 * ((b @ (a @ a.T)) * b).sum(1)
        squares.append(square)
    total = torch.cat(squares)
    if sum_over_ranks and model_parallel_layout()[1] > 1:
        torch.distributed.all_reduce(total, group=mpu.get_model_parallel_group())
    return total.clamp_min_(0).sqrt_()


def gain(magnitude: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return g = m / |.|, (adapted rows,) in the dtype of m; 1 for a row of zeros.

    Rounded norms make it exactly 1 on a fresh adapter.
    """
    norms = norms.to(magnitude.dtype)
    return torch.where(norms > 0, magnitude / torch.where(norms > 0, norms, 1), torch.ones_like(norms))


def spread(per_row: torch.Tensor, layout: DeltaLayout) -> torch.Tensor:
    """Return (width,) values, one per row, of one value per adapted row, with 1 for the rows that are not adapted."""
    parts = {columns.start: per_row.new_ones(columns.stop - columns.start) for columns in layout.gaps()}
    parts |= {columns.start: per_row[rows] for columns, rows, _ in layout.pieces(0)}
    return torch.cat([parts[start] for start in sorted(parts)])


def rescale(y: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, channel_dim: int) -> torch.Tensor:
    """Return g (y - bias) + bias along `channel_dim` of y, in its shape and dtype."""
    shape = [1] * y.dim()
    shape[channel_dim] = -1
    gain = gain.to(y.dtype).view(shape)
    return y * gain if bias is None else y * gain + bias.to(y.dtype).view(shape) * (1 - gain)
