"""Under ZeRO-3 a linear gives the very values that torch's gives."""

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional as F

from sat_lora.training.steps.zero3_linear import round_once


def run(linear, shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator).bfloat16().requires_grad_() for size in (shape, (32, 64), (32,))
    )
    y = linear(x, weight, bias if with_bias else None)
    y.backward(torch.randn(y.shape, generator=generator).bfloat16())
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (6, 64), (2, 3, 64), (2, 1, 3, 64), (0, 3, 64)], ids=str)
def test_values_and_gradients_are_torchs_bit_for_bit(monkeypatch, shape, with_bias):
    expected = run(F.linear, shape, with_bias)
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    round_once()
    assert F.linear is not zero3_linear_wrap
    for got, wanted in zip(run(F.linear, shape, with_bias), expected):
        assert got.shape == wanted.shape
        assert torch.equal(got, wanted)


def test_without_zero_3_torchs_own_stays():
    before = F.linear
    round_once()
    assert F.linear is before
