"""How A and B begin. Whole matrices are drawn and cut afterwards, so that no value depends on the parallel layout.

Shapes: W (out, in), A (r, in), B (out, r); s is the scale before B A.
"""

import math
from collections.abc import Callable

import torch

from sat_lora.lora.deltas.delta import Delta

Weight = Callable[[], torch.Tensor]


def initial_delta(
    scheme: str,
    weights: list[Weight],
    shapes: list[tuple[int, int]],
    *,
    rank: int,
    scale: float,
    is_embedding: bool,
    seed: int,
) -> Delta:
    """Return the delta of all slots of one layer, in float32 or the dtype of W if that is wider.

    weights, shapes: for each slot what gives its W, and W's (out, in). is_embedding: the layer is an embedding; there A
    begins with zeros and B is drawn (as in PEFT), since a row of A is trained only by the ids that occur.
    """
    generator = torch.Generator().manual_seed(seed)
    in_features = shapes[0][1]
    outs = [out for out, _ in shapes]
    if scheme in ("kaiming", "gaussian"):
        a = torch.empty(len(outs) * rank, in_features)
        b = torch.zeros(sum(outs), rank)
        if is_embedding:
            return Delta(a.zero_(), b.normal_(generator=generator), scale)
        if scheme == "gaussian":
            return Delta(a.normal_(std=1 / rank, generator=generator), b, scale)
        bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
        return Delta(a.uniform_(-bound, bound, generator=generator), b, scale)
    deltas = []
    for weight, shape in zip(weights, shapes):
        if scheme == "orthogonal":
            deltas.append(_orthogonal(shape, rank, scale, generator))
        elif scheme == "olora":
            deltas.append(_olora(weight(), rank, scale))
        else:
            _, _, steps = scheme.partition("_niter_")
            deltas.append(_pissa(weight(), rank, scale, int(steps) if steps else None, generator))
    return Delta(torch.cat([delta.a for delta in deltas]), torch.cat([delta.b for delta in deltas]), scale)


def _orthogonal(shape: tuple[int, int], rank: int, scale: float, generator: torch.Generator) -> Delta:
    """Return A and B with B A = 0 and neither zero: every other row of an orthogonal matrix for A, the rest for B."""
    out_features, in_features = shape
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    a = torch.randn(in_features, rank // 2, generator=generator) @ q[0::2] / 10
    b = torch.randn(out_features, rank // 2, generator=generator) @ q[1::2] / 10
    return Delta(a.T.contiguous(), b, scale)


def _pissa(weight: torch.Tensor, rank: int, scale: float, steps: int | None, generator: torch.Generator) -> Delta:
    """Return s B A = the best approximation of W of that rank, split evenly (PiSSA, arXiv 2404.02948, 3)."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if steps is None:
        return best_approximation(weight, rank, scale)
    with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        u, singular, v = torch.svd_lowrank(weight, rank, niter=steps)
    return _split_evenly(u, singular, v.T, scale)


def best_approximation(weight: torch.Tensor, rank: int, scale: float) -> Delta:
    """Return s B A = the best approximation of W of that rank, split evenly, in the dtype of W."""
    u, singular, vh = torch.linalg.svd(weight, full_matrices=False)
    return _split_evenly(u[:, :rank], singular[:rank], vh[:rank], scale)


def _split_evenly(u: torch.Tensor, singular: torch.Tensor, vh: torch.Tensor, scale: float) -> Delta:
    root = (singular / scale).sqrt()
    return Delta(root[:, None] * vh, u * root, scale)


def _olora(weight: torch.Tensor, rank: int, scale: float) -> Delta:
    """Return B and A, the first columns and rows of W = Q R (OLoRA, arXiv 2406.01775, 3): A of R, B of Q."""
    q, r = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return Delta(r[:rank].contiguous(), q[:, :rank].contiguous(), scale)
