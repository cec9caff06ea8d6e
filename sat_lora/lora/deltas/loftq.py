"""LoftQ: how a quantised weight and a pair of low rank come as close to the original together as they can.

For T rounds (Li et al., arXiv 2310.08659, algorithm 1), with L of rank r and L_0 = 0:

    Q_t = q(W - L_{t-1})
    L_t = the best approximation of W - Q_t of that rank, by SVD

Each slot of a fused layer has a pair of its own, on its own rows, and a block of codes never crosses a row. So the
rounds go slot by slot, and rows without a slot keep q(W). Everything is computed on the whole matrix, in float32 or
the dtype of W if that is wider: no value depends on the parallel layout, but where that changes the blocks.
"""

from collections.abc import Sequence

import torch

from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.deltas.initialize import best_approximation
from sat_lora.quantized.schemes import Scheme, encode

Rows = Sequence[tuple[int, int]]


def encoded_part(
    weight: torch.Tensor, rows: Rows, scheme: Scheme, block: int, *, rank: int, rounds: int
) -> torch.Tensor:
    """Return W - L_{T-1} (out, in) of W (out, in): what is encoded as Q_T. After one round that is W.

    rows: those of each slot.
    """
    encoded = weight.clone()
    for start, stop in rows:
        for _ in range(rounds - 1):
            pair = low_rank_part(weight, encoded, ((start, stop),), scheme, block, rank=rank, scale=1.0)
            encoded[start:stop] = weight[start:stop] - pair.b @ pair.a
    return encoded


def low_rank_part(
    weight: torch.Tensor, encoded: torch.Tensor, rows: Rows, scheme: Scheme, block: int, *, rank: int, scale: float
) -> Delta:
    """Return L_T as the delta of all slots, scale * B A, of W and W - L_{T-1} (out, in both)."""
    pairs = []
    for start, stop in rows:
        codes, scales = encode(encoded[start:stop], scheme, block)
        error = weight[start:stop] - scheme.decode(codes, scales, weight.dtype)
        pairs.append(best_approximation(error, rank, scale))
    return Delta(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs]), scale)
