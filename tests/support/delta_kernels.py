"""What the kernels for large tensors must do, on a CPU under Triton's interpreter or on a GPU; float64 decides.

This imports triton, as `sat_lora.lora.deltas.delta_kernels` does, which asks for its interpreter then.
"""

import torch

from sat_lora.lora.deltas import delta_kernels as kernels
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.lora.deltas.low_rank import RandomDropout, add_delta

EPS32 = torch.finfo(torch.float32).eps
ROWS, IN = 37, 83  # odd, and several tiles of `SMALL`
DROPPED, SEED = 3277, 2**40 + 5  # 5 % of 2^16


def layouts(width: int) -> dict[str, DeltaLayout]:
    """Slots of a y with 6 x width columns."""
    return {
        "whole": DeltaLayout(((0, 6 * width),), 6 * width),
        "q, k, v": DeltaLayout(tuple((2 * i * width, 2 * (i + 1) * width) for i in range(3)), 6 * width),
        "q and v": DeltaLayout(((0, 2 * width), (4 * width, 6 * width)), 6 * width),
        "grouped": DeltaLayout(((0, 4 * width), (4 * width, 5 * width), (5 * width, 6 * width)), 6 * width),
        "v alone": DeltaLayout(((5 * width, 6 * width),), 6 * width),
    }


def random(dtype, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seed_tensor(number=SEED, device="cpu"):
    return torch.tensor(number, dtype=torch.int64, device=device)


def assert_rounded_once(ours, exact, magnitude):
    """Within one rounding, and a float32 sum of terms whose absolute values sum up to `magnitude`.

    The interpreter cuts bfloat16 off where a GPU rounds.
    """
    assert ours.shape == exact.shape
    half = 1.0 if ours.dtype == torch.bfloat16 and ours.device.type == "cpu" else 0.5
    bound = half * torch.finfo(ours.dtype).eps * exact.abs() + 16 * EPS32 * magnitude
    bound = bound + 2.0**-24 * (ours.dtype == torch.float16)  # below which float16 has no more numbers
    assert ((ours.double() - exact).abs() <= bound).all()


def mask_of(rows, columns, seed, dropped, blocks, device="cpu"):
    """What `spread` leaves of ones."""
    ones = torch.ones(rows, 1, device=device), torch.ones(1, columns, device=device)
    mask = kernels.spread(*ones, seed, dropped, blocks)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    return mask


def check_addition(dtype, rank, layout, rows, blocks, device="cpu"):
    adapted = sum(stop - start for start, stop in layout.slots)
    y = random(dtype, rows, layout.width).to(device)
    s = random(dtype, rows, rank * len(layout.slots), seed=1).to(device)
    b = random(dtype, adapted, rank, seed=2).to(device)
    exact, magnitude = y.double(), y.double().abs()
    for columns, of_b, of_s in layout.pieces(rank):
        exact[:, columns] += 1.7 * s[:, of_s].double() @ b[of_b].double().T
        magnitude[:, columns] += 1.7 * s[:, of_s].double().abs() @ b[of_b].double().abs().T
    untouched = [y[:, gap].clone() for gap in layout.gaps()]
    kernels.add_slots(y, s, b, 1.7, layout, blocks)
    assert_rounded_once(y, exact, magnitude)
    assert all(torch.equal(y[:, gap], before) for gap, before in zip(layout.gaps(), untouched))


def check_dropout(dtype, ranks, rows, columns, blocks, transposed, device="cpu"):
    """S, the gradient of x and that of A, of one mask."""
    x = random(dtype, rows, columns).to(device)
    a = random(dtype, ranks, columns, seed=1).to(device)
    ds = random(dtype, ranks, rows, seed=2).to(device).t()
    ds = ds if transposed else ds.contiguous()
    seed = seed_tensor(device=device)
    mask = mask_of(rows, columns, seed, DROPPED, blocks, device).double()
    dropped = x.double() * mask
    s = kernels.project(x, a, seed, DROPPED, blocks)
    assert s.dtype == dtype
    assert_rounded_once(s, dropped @ a.double().T, dropped.abs() @ a.double().abs().T)
    dx = kernels.spread(ds, a, seed, DROPPED, blocks)
    assert dx.dtype == dtype
    assert_rounded_once(dx, ds.double() @ a.double() * mask, ds.double().abs() @ a.double().abs())
    da = kernels.gradient_of_a(ds, x, seed, DROPPED, 1.7, blocks)
    assert da.dtype == dtype
    assert_rounded_once(da, 1.7 * ds.double().T @ dropped, 1.7 * ds.double().abs().T @ dropped.abs())
    assert torch.equal(da, kernels.gradient_of_a(ds, x, seed, DROPPED, 1.7, blocks))


def check_masks(blocks, other_blocks, rows=640, columns=1001, device="cpu"):
    """Shares, independence of seed and tile, and of neighbours."""
    masks = {}
    for dropped in (0, DROPPED, 2**15, 2**16):
        mask = mask_of(rows, columns, seed_tensor(device=device), dropped, blocks, device).double()
        other = mask_of(rows, columns, seed_tensor(device=device), dropped, other_blocks, device).double()
        assert torch.equal(mask, other)
        share = 1 - dropped / 2**16
        for dims, size in (((0, 1), rows * columns), (0, rows), (1, columns)):
            assert ((mask.mean(dims) - share).abs() <= 6 * (share * (1 - share) / size) ** 0.5).all()
        masks[dropped] = mask
    half = masks[2**15] * 2 - 1
    other_seeds = (SEED + 1, SEED + 2**32)  # both halves of it matter
    others = [mask_of(rows, columns, seed_tensor(seed, device), 2**15, blocks, device) for seed in other_seeds]
    pairs = [(half, other.double() * 2 - 1) for other in others]
    pairs += [(half[:, step:], half[:, :-step]) for step in (*range(1, 9), 64)]
    pairs += [(half[step:], half[:-step]) for step in (1, 2, 8, 16, 32)]
    for one, other in pairs:  # uncorrelated
        assert (one * other).mean().abs() < 6 / one.numel() ** 0.5


def check_autograd(dtype, device="cpu"):
    """`add_delta` with every kernel, alone and with the product fused, against its reference in float64."""
    for layout in layouts(8).values():
        x, weight = random(dtype, 21, 40), random(dtype, layout.width, 40, seed=1)
        a = random(dtype, 4 * len(layout.slots), 40, seed=2)
        b = random(dtype, sum(stop - start for start, stop in layout.slots), 4, seed=3)
        grad = random(dtype, 21, layout.width, seed=4).to(device)
        tensors = [tensor.to(device).requires_grad_() for tensor in (x, a, b)]
        weight = weight.to(device)
        dropout = RandomDropout(0.25)
        torch.manual_seed(SEED)
        _, mask, _ = dropout.project(*(tensor.detach() for tensor in tensors[:2]), 1.7)
        assert mask.shape == ()
        kept = kernels.spread(tensors[0].new_ones(21, 1), tensors[0].new_ones(1, 40), mask, 2**14).double().detach()
        x, a, b = exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        y = x @ weight.double().T
        s = (x * kept) @ a.T
        delta = torch.zeros_like(y)
        for columns, of_b, of_s in layout.pieces(4):
            delta[:, columns] = s[:, of_s] @ b[of_b].T * 1.7 / 0.75
        y = y + delta
        wanted = [y, *torch.autograd.grad(y, exact, grad.double())]
        for fused in (False, True):
            torch.manual_seed(SEED)
            product = tensors[0] @ weight.T
            version = product._version
            y = add_delta(product, *tensors, dropout, 1.7, layout, *([weight] if fused else []))
            assert product._version == version + fused
            got = [y, *torch.autograd.grad(y, tensors, grad)]
            for ours, exact_one in zip(got, wanted, strict=True):
                assert ours.dtype == dtype and ours.shape == exact_one.shape
                error = (ours.double() - exact_one).norm() / exact_one.norm()
                assert error < 4 * torch.finfo(dtype).eps


def check_far_rows(device, rows=150_000, columns=15_360):
    """The last rows of tensors with more than 2^31 elements."""
    last = slice(rows - 20, rows)
    x, a = (
        torch.ones(rows, columns, dtype=torch.bfloat16, device=device),
        random(torch.bfloat16, 16, columns).to(device),
    )
    x[last] = random(torch.bfloat16, 20, columns, seed=1).to(device)
    s = torch.zeros(rows, 16, dtype=torch.bfloat16, device=device)
    s[last] = random(torch.bfloat16, 20, 16, seed=2).to(device)
    seed = seed_tensor(device=device)
    near, wide, far = x[last].double(), a.double(), s[last].double()
    spread = kernels.spread(s, a, seed, DROPPED)
    kept = (spread[last] != 0).double()
    assert abs(kept.mean() - (1 - DROPPED / 2**16)) < 0.01
    assert_rounded_once(spread[last], far @ wide * kept, far.abs() @ wide.abs())
    del spread
    projected = kernels.project(x, a, seed, DROPPED)
    assert_rounded_once(projected[last], (near * kept) @ wide.T, (near * kept).abs() @ wide.abs().T)
    gradient = kernels.gradient_of_a(s, x, seed, DROPPED, 1.0)
    assert_rounded_once(gradient, far.T @ (near * kept), far.abs().T @ (near * kept).abs())
    kernels.add_slots(x, s, a.t().contiguous(), 1.0, DeltaLayout(((0, columns),), columns))
    assert_rounded_once(x[last], near + far @ wide, near.abs() + far.abs() @ wide.abs())
    assert (x[: rows - 20] == 1).all()
