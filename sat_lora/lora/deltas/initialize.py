"""How A and B begin. Whole matrices are drawn and cut afterwards, so that no value depends on the parallel layout.

Shapes: W (out, in), A (r, in), B (out, r); s is the scale before B A.
"""

import math
from collections.abc import Callable

import torch

Weight = Callable[[], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r)."""


def initial_factors(
    scheme: str,
    weights: list[Weight],
    shapes: list[tuple[int, int]],
    *,
    rank: int,
    scale: float,
    is_embedding: bool,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A (slots * r, in), B (rows of all slots, r)) of one layer, in float32 or the dtype of W if that is wider.

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
            return a.zero_(), b.normal_(generator=generator)
        if scheme == "gaussian":
            return a.normal_(std=1 / rank, generator=generator), b
        bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
        return a.uniform_(-bound, bound, generator=generator), b
    pairs = []
    for weight, shape in zip(weights, shapes):
        if scheme == "orthogonal":
            pairs.append(_orthogonal(shape, rank, generator))
        elif scheme == "olora":
            pairs.append(_olora(weight(), rank))
        else:
            _, _, steps = scheme.partition("_niter_")
            pairs.append(_pissa(weight(), rank, scale, int(steps) if steps else None, generator))
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


def _orthogonal(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Pair:
    """Return A and B with B A = 0 and neither zero: every other row of an orthogonal matrix for A, the rest for B."""
    out_features, in_features = shape
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    a = torch.randn(in_features, rank // 2, generator=generator) @ q[0::2] / 10
    b = torch.randn(out_features, rank // 2, generator=generator) @ q[1::2] / 10
    return a.T.contiguous(), b


def _pissa(weight: torch.Tensor, rank: int, scale: float, steps: int | None, generator: torch.Generator) -> Pair:
    """Return A and B with s B A = the best approximation of W of that rank, split evenly (arXiv 2404.02948, 3)."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if steps is None:
        u, singular, vh = torch.linalg.svd(weight, full_matrices=False)
        u = u[:, :rank]
        singular = singular[:rank]
        vh = vh[:rank]
    else:
        with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            u, singular, v = torch.svd_lowrank(weight, rank, niter=steps)
        vh = v.T
    root = (singular / scale).sqrt()
    return root[:, None] * vh, u * root


def _olora(weight: torch.Tensor, rank: int) -> Pair:
    """Return A and B, the first rows and columns of W = Q R (OLoRA, arXiv 2406.01775, 3): A of R, B of Q."""
    q, r = torch.linalg.qr(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return r[:rank].contiguous(), q[:, :rank].contiguous()
