"""The kernels for large tensors, run by Triton's interpreter, against float64."""

import os
import subprocess
import sys

import pytest
import torch

from sat_lora.functional import DeltaLayout

DTYPES = ["float32", "bfloat16", "float16"]
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


def let_the_interpreter_multiply_bfloat16():
    """Triton 3.9's takes the bits of bfloat16 for the numbers that it multiplies."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


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


def mask_of(kernels, rows, columns, seed, dropped, blocks, device="cpu"):
    """What `spread` leaves of ones."""
    ones = torch.ones(rows, 1, device=device), torch.ones(1, columns, device=device)
    mask = kernels.spread(*ones, seed, dropped, blocks)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    return mask


def check_addition(kernels, dtype, rank, layout, rows, blocks, device="cpu"):
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


def check_dropout(kernels, dtype, ranks, rows, columns, blocks, transposed, device="cpu"):
    """S, the gradient of x and that of A, of one mask."""
    x = random(dtype, rows, columns).to(device)
    a = random(dtype, ranks, columns, seed=1).to(device)
    ds = random(dtype, ranks, rows, seed=2).to(device).t()
    ds = ds if transposed else ds.contiguous()
    seed = seed_tensor(device=device)
    mask = mask_of(kernels, rows, columns, seed, DROPPED, blocks, device).double()
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


def check_masks(kernels, blocks, other_blocks, rows=640, columns=1001, device="cpu"):
    """Shares, independence of seed and tile, and of neighbours."""
    masks = {}
    for dropped in (0, DROPPED, 2**15, 2**16):
        mask = mask_of(kernels, rows, columns, seed_tensor(device=device), dropped, blocks, device).double()
        other = mask_of(kernels, rows, columns, seed_tensor(device=device), dropped, other_blocks, device).double()
        assert torch.equal(mask, other)
        share = 1 - dropped / 2**16
        for dims, size in (((0, 1), rows * columns), (0, rows), (1, columns)):
            assert ((mask.mean(dims) - share).abs() <= 6 * (share * (1 - share) / size) ** 0.5).all()
        masks[dropped] = mask
    half = masks[2**15] * 2 - 1
    other_seeds = (SEED + 1, SEED + 2**32)  # both halves of it matter
    others = [mask_of(kernels, rows, columns, seed_tensor(seed, device), 2**15, blocks, device) for seed in other_seeds]
    pairs = [(half, other.double() * 2 - 1) for other in others]
    pairs += [(half[:, step:], half[:, :-step]) for step in (*range(1, 9), 64)]
    pairs += [(half[step:], half[:-step]) for step in (1, 2, 8, 16, 32)]
    for one, other in pairs:  # uncorrelated
        assert (one * other).mean().abs() < 6 / one.numel() ** 0.5


def check_all(dtype):
    let_the_interpreter_multiply_bfloat16()
    from sat_lora import delta_kernels as kernels

    small = kernels.Blocks(16, 32)
    for rank in (4, 8, 16, 48, 64, 72):
        for layout in layouts(11).values():
            check_addition(kernels, dtype, rank, layout, ROWS, small)
    check_addition(kernels, dtype, 16, layouts(64)["q, k, v"], 65, None)
    check_addition(kernels, dtype, 16, layouts(8)["whole"], 0, None)
    for number, ranks in enumerate((4, 16, 48, 64, 144)):
        check_dropout(kernels, dtype, ranks, ROWS, IN, small, transposed=number % 2 == 0)
    check_dropout(kernels, dtype, 16, 70, 300, None, transposed=False)
    check_dropout(kernels, dtype, 16, 0, IN, small, transposed=False)
    if dtype == torch.float32:
        check_masks(kernels, kernels.Blocks(128, 256), kernels.Blocks(64, 512))


def in_the_interpreter(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", DTYPES)
def test_kernels_equal_float64_rounded_once(name):
    """In a process of its own: Triton asks for its interpreter when it is imported."""
    in_the_interpreter(
        f"import torch; from tests import test_delta_kernels; test_delta_kernels.check_all(torch.{name})"
    )


COMPILE = """
import itertools
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sat_lora import delta_kernels
from sat_lora.delta_kernels import ADD, GRADIENT, PROJECT, SPREAD, gradient_of_a_kernel, product_kernel, project_kernel

KERNELS = [
    (product_kernel, ADD, dict(ADDS=True, DROPS=False, CHUNKS=1)),
    (product_kernel, SPREAD, dict(ADDS=False, DROPS=True, CHUNKS=1)),
    (project_kernel, PROJECT, {}),
    (gradient_of_a_kernel, GRADIENT, {}),
]
TYPES = dict(seed="*i64", parts="*fp32", scale="fp32")
TYPES |= dict.fromkeys(("out", "left", "right", "s", "x", "a", "ds"), "*dtype")
for (kernel, tiles, constants), dtype, capability in itertools.product(KERNELS, ("bf16", "fp32"), (80, 90)):
    blocks = tiles[4 if dtype == "fp32" else 2]
    constants = dict(ROWS=blocks.rows, COLUMNS=blocks.columns, RANKS=64, **constants)
    signature = {name: TYPES.get(name, "i32").replace("dtype", dtype) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = dict(num_warps=blocks.warps, num_stages=blocks.stages)
    assert "cubin" in compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
"""


def test_kernels_compile_for_cuda(tmp_path):
    """Needs no GPU: Triton brings its own assembler."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_kernel_is_imported_on_the_cpu():
    script = """
import sys, torch
from sat_lora.functional import DeltaLayout, RandomDropout, add_delta
x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((5, 4), (2, 4), (6, 2)))
weight = torch.randn(6, 4)
add_delta(x @ weight.T, x, a, b, RandomDropout(0.5), 1.0, DeltaLayout(((0, 6),), 6), weight).sum().backward()
assert "sat_lora.delta_kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
