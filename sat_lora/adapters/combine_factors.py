"""The arithmetic of `combine`: deltas in, one delta out. What the methods are is told there.

The scale of what comes in has the adapter's weight in it and may be negative; that of what comes out is 1.
"""

import math
from collections.abc import Iterable

import torch

from sat_lora.lora.deltas.delta import Delta

Side = tuple[list[torch.Tensor], list[float]]
"""Every A, or every B, and what each is multiplied by."""


def cat(deltas: list[Delta]) -> Delta:
    """Return A (sum of ranks, in) and B (out, sum of ranks): B A is the sum of s B A."""
    a = [delta.scale * delta.a for delta in deltas]
    b = [delta.b for delta in deltas]
    return Delta(torch.cat(a), torch.cat(b, dim=1))


def svd(deltas: list[Delta], rank: int | None) -> Delta:
    """Return the best B A of that rank for the sum of s B A, singular values split evenly.

    With B = Q1 R1 and A^T = Q2 R2 of the stacked factors, B A = Q1 (R1 R2^T) Q2^T, and the SVD of the small core gives
    that of the product: out x in is never formed. No rank is larger than the core: pairs beyond it would be zero, and
    never train.
    """
    exact = cat(deltas)
    q1, r1 = torch.linalg.qr(exact.b)
    q2, r2 = torch.linalg.qr(exact.a.T)
    u, singular, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    rank = min(rank or max(delta.rank for delta in deltas), len(singular))
    root = singular[:rank].sqrt()
    return Delta(root[:, None] * (vh[:rank] @ q2.T), (q1 @ u[:, :rank]) * root)


def linear(deltas: list[Delta]) -> Delta:
    """Return the sum of sqrt(s) A and that of sqrt(s) B; all are of one rank."""
    of_a, of_b = _sides(deltas)
    return Delta(_weighted(*of_a).sum(0), _weighted(*of_b).sum(0))


def ties(deltas: list[Delta], density: float, majority_sign: str) -> Delta:
    """Return the delta of `linear`, with `ties_sum` for its sums."""
    of_a, of_b = _sides(deltas)
    return Delta(ties_sum(*of_a, density, majority_sign), ties_sum(*of_b, density, majority_sign))


def ties_sum(tensors: list[torch.Tensor], weights: list[float], density: float, majority_sign: str) -> torch.Tensor:
    """Return the sum by TIES: trim, elect a sign per entry, average what has that sign (arXiv 2306.01708, 4).

    As in PEFT, weights enter after the election, and the average is over the number of adapters.
    """
    trimmed = torch.stack([trim(tensor, density) for tensor in tensors])
    votes = (trimmed if majority_sign == "total" else trimmed.sign()).sum(0)
    agrees = trimmed.sign() == torch.where(votes >= 0, 1, -1)
    return (_weighted(trimmed, weights) * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Return the tensor with its int(density * n) entries of largest magnitude, and zero elsewhere."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def _sides(deltas: list[Delta]) -> tuple[Side, Side]:
    """Return (every A, its sqrt|s| with the sign of s), (every B, sqrt|s|): a sign on both sides would cancel."""
    roots = [math.sqrt(abs(delta.scale)) for delta in deltas]
    signed = [math.copysign(root, delta.scale) for root, delta in zip(roots, deltas)]
    return ([delta.a for delta in deltas], signed), ([delta.b for delta in deltas], roots)


def _weighted(tensors: Iterable[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors)])
