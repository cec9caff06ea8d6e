"""The kernels of a delta on large tensors on a GPU: what the interpreter shows, in the sizes that are used."""

import pytest
import torch

from sat_lora.lora.deltas.low_rank import DROPOUT_KERNELS_FROM, RandomDropout

pytestmark = pytest.mark.cuda
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [4, 16, 48, 64]


@pytest.fixture(scope="module")
def checks():
    """The module of the checks, which imports triton."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from tests.support import delta_kernels

    return delta_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_addition_equals_float64_rounded_once(checks, dtype, rank):
    for width in (11, 128):
        for layout in checks.layouts(width).values():
            checks.check_addition(dtype, rank, layout, 333, None, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [*RANKS, 144])
def test_dropout_equals_float64_rounded_once(checks, dtype, ranks):
    for rows, columns in ((0, 64), (37, 83), (1000, 1792)):
        for transposed in (False, True):
            checks.check_dropout(dtype, ranks, rows, columns, None, transposed, "cuda")


def test_masks_are_random_and_the_same_in_every_tile(checks):
    blocks = checks.kernels.Blocks
    checks.check_masks(blocks(32, 256), blocks(64, 128, warps=8), rows=4000, columns=3001, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_float64(checks, dtype, monkeypatch):
    monkeypatch.setattr("sat_lora.lora.deltas.low_rank.ADDITION_KERNEL_FROM", 0)
    monkeypatch.setattr("sat_lora.lora.deltas.low_rank.DROPOUT_KERNELS_FROM", 0)
    checks.check_autograd(dtype, "cuda")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_large_x_keeps_the_seed_alone(checks, dtype):
    a = torch.ones(4, 1024, dtype=dtype, device="cuda")
    for rows in (DROPOUT_KERNELS_FROM // 1024, DROPOUT_KERNELS_FROM // 1024 - 1):
        x = torch.ones(rows, 1024, dtype=dtype, device="cuda")
        _, mask, _ = RandomDropout(0.5).project(x, a, 1.0)
        is_seed = x.numel() >= DROPOUT_KERNELS_FROM and dtype != torch.float64
        assert mask.shape == (() if is_seed else x.shape)


def test_offsets_beyond_32_bits(checks):
    checks.check_far_rows("cuda")
