"""The kernels for large tensors, run by Triton's interpreter, against float64."""

import os
import subprocess
import sys

import pytest

from tests.support.ranks import run_ranks
from tests.support.triton_interpreter import in_the_interpreter, let_the_interpreter_multiply_bfloat16

RANKS, RANKS_DROPPED = (4, 8, 16, 48, 64, 72), (4, 16, 48, 64, 144)
FEW_RANKS, FEW_RANKS_DROPPED = (72,), (48,)
ROWS, IN = 37, 83  # odd, and several of the small tiles


def check_all(dtype, ranks=RANKS, ranks_dropped=RANKS_DROPPED, large_tiles=True):
    let_the_interpreter_multiply_bfloat16()
    import torch

    from sat_lora.lora.deltas import low_rank as functional
    from sat_lora.lora.deltas.delta_kernels import Blocks
    from tests.support.delta_kernels import check_addition, check_autograd, check_dropout, check_masks, layouts

    small = Blocks(16, 32)
    for rank in ranks:
        for layout in layouts(11).values():
            check_addition(dtype, rank, layout, ROWS, small)
    if large_tiles:
        check_addition(dtype, 16, layouts(64)["q, k, v"], 65, None)
        check_dropout(dtype, 16, 70, 300, None, transposed=False)
    check_addition(dtype, 16, layouts(8)["whole"], 0, None)
    for number, rank in enumerate(ranks_dropped):
        check_dropout(dtype, rank, ROWS, IN, small, transposed=number % 2 == 0)
    check_dropout(dtype, 16, 0, IN, small, transposed=False)
    functional._has_kernels = lambda tensor, elements: True
    check_autograd(dtype)
    if dtype == torch.float32:
        check_masks(Blocks(128, 256), Blocks(64, 512))


def test_kernels_equal_float64_rounded_once():
    """In a process of its own: Triton asks for its interpreter when it is imported."""
    in_the_interpreter(
        "import torch; from tests.lora.deltas.test_delta_kernels import FEW_RANKS, FEW_RANKS_DROPPED, check_all; "
        "check_all(torch.bfloat16, FEW_RANKS, FEW_RANKS_DROPPED, large_tiles=False)"
    )


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["bfloat16", "float32", "float16"])
def test_kernels_of_every_rank_and_dtype_equal_float64_rounded_once(name):
    checks = "tests.lora.deltas.test_delta_kernels"
    in_the_interpreter(f"import torch; from {checks} import check_all; check_all(torch.{name})")


COMPILE = """
import itertools
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sat_lora.lora.deltas import delta_kernels
from sat_lora.lora.deltas.delta_kernels import ADD, GRADIENT, PROJECT, SPREAD
from sat_lora.lora.deltas.delta_kernels import gradient_of_a_kernel, product_kernel, project_kernel

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
    constants = dict(ROWS=blocks.rows, COLUMNS=blocks.columns, RANKS=16, **constants)
    signature = {name: TYPES.get(name, "i32").replace("dtype", dtype) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = dict(num_warps=blocks.warps, num_stages=blocks.stages)
    assert "cubin" in compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
"""


@pytest.mark.matrix
def test_kernels_compile_for_cuda(tmp_path):
    """Needs no GPU: Triton brings its own assembler."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def delta_with_dropout():
    """Whether the kernels have been imported after a delta with everything that they are for."""
    import torch

    from sat_lora.lora.deltas.layout import DeltaLayout
    from sat_lora.lora.deltas.low_rank import RandomDropout, add_delta

    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((5, 4), (2, 4), (6, 2)))
    weight, layout = torch.randn(6, 4), DeltaLayout(((0, 6),), 6)
    add_delta(x @ weight.T, x, a, b, RandomDropout(0.5), 1.0, layout, weight).sum().backward()
    return "sat_lora.lora.deltas.delta_kernels" in sys.modules


def test_no_kernel_is_imported_on_the_cpu():
    assert run_ranks(delta_with_dropout, 1) == [False]
