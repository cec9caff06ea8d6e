"""The lengths of rows and what they scale, against the formulas."""

import pytest
import torch

from sat_lora.lora.deltas import dora
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.deltas.dora import gain, rescale, row_norms, spread
from sat_lora.lora.deltas.layout import DeltaLayout

LAYOUT = DeltaLayout(((0, 2), (5, 8)), 9)  # rows 2 to 4, and the last, are not adapted


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((9, 6), (2 * 2, 6), (5, 2))]


def whole_delta(a, b, scale):
    delta = torch.zeros(9, 6, dtype=torch.float64)
    delta[0:2], delta[5:8] = scale * b[0:2] @ a[0:2], scale * b[2:5] @ a[2:4]
    return delta


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.7, -3.0])
def test_norms_are_those_of_the_changed_rows(dtype, scale):
    matrix, a, b = operands(dtype)
    exact = (matrix.double() + whole_delta(a.double(), b.double(), scale)).norm(dim=1)[[0, 1, 5, 6, 7]]
    norms = row_norms(matrix, LAYOUT, Delta(a, b, scale))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, exact, rtol=tolerance, atol=tolerance)
    plain = row_norms(matrix, LAYOUT)
    torch.testing.assert_close(plain, matrix.double().norm(dim=1)[[0, 1, 5, 6, 7]], rtol=1e-12, atol=0)


def test_a_row_that_the_delta_takes_away_has_a_norm_of_zero():
    """Where rounding would have made the square negative."""
    matrix, a, b = torch.full((1, 3), 0.1), torch.full((1, 3), 0.1), torch.full((1, 1), -1.0)
    norms = row_norms(matrix, DeltaLayout(((0, 1),), 1), Delta(a, b, 1.0))
    assert 0 <= norms.item() < 1e-4


def test_short_rows_have_short_norms():
    assert row_norms(torch.full((2, 4), 0.25), DeltaLayout(((0, 2),), 2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("sum_over_ranks", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_squares_are_summed_over_the_ranks_that_hold_parts_of_the_rows(monkeypatch, sum_over_ranks, size):
    matrix = operands()[0]
    monkeypatch.setattr(dora, "model_parallel_layout", lambda: (0, size))
    monkeypatch.setattr(dora.mpu, "get_model_parallel_group", lambda: "ranks")
    groups = []

    def all_reduce(tensor, group):
        groups.append(group)
        tensor.mul_(4)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    norms = row_norms(matrix, LAYOUT, sum_over_ranks=sum_over_ranks)
    is_summed = sum_over_ranks and size > 1
    assert groups == ["ranks"] * is_summed
    expected = matrix.norm(dim=1)[[0, 1, 5, 6, 7]] * (2 if is_summed else 1)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)


def test_a_gain_is_the_magnitude_over_the_norm_and_one_for_a_row_of_zeros():
    magnitude = torch.tensor([3.0, 2.0, 5.0, 1.0], requires_grad=True)
    gains = gain(magnitude, torch.tensor([2.0, 0.5, 0.0, 1.0], dtype=torch.float64))
    assert gains.dtype == torch.float32 and gains.tolist() == [1.5, 4.0, 1.0, 1.0]
    gains.sum().backward()
    assert magnitude.grad.tolist() == [0.5, 2.0, 0.0, 1.0]


def test_rows_that_are_not_adapted_are_not_scaled():
    spread_out = spread(torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0]), LAYOUT)
    assert spread_out.tolist() == [2.0, 3.0, 1.0, 1.0, 1.0, 4.0, 5.0, 6.0, 1.0]


@pytest.mark.parametrize("channel_dim", [-1, -2, 0])
def test_an_output_is_scaled_around_its_bias(channel_dim):
    y = torch.randn(3, 3, 3, dtype=torch.float64)
    gains, bias = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([1.0, -1.0, 4.0])
    shape = [1, 1, 1]
    shape[channel_dim] = 3
    g, c = gains.double().view(shape), bias.double().view(shape)
    torch.testing.assert_close(rescale(y, gains, bias, channel_dim), g * (y - c) + c)
    torch.testing.assert_close(rescale(y, gains, None, channel_dim), g * y)
