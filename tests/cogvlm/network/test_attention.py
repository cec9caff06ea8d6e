"""Attention against a plain softmax, and what a mask means."""

import pytest
import torch

from sat_lora.cogvlm.network.attention import CAUSAL, FULL, MASKED, attend, mask_kind
from sat_lora.cogvlm.network.rotary import RotaryEmbedding, rotate

RAGGED = torch.tensor([[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]]])


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (None, FULL),
        (-1, CAUSAL),
        (torch.ones(1, 1, 4, 4), FULL),
        (torch.ones(1, 1, 1, 6), FULL),  # one cached step over six tokens
        (torch.ones(4, 4).tril(), CAUSAL),
        (torch.ones(2, 1, 4, 4, dtype=torch.bool).tril(), CAUSAL),
        (torch.ones(2, 1, 4, 4, dtype=torch.long).tril(), CAUSAL),
        (torch.ones(4, 4).triu(), MASKED),
        (torch.ones(4, 6).tril(), MASKED),  # the cache makes it no square
        (torch.tensor([1, 0, 0, 0]).view(1, 1, 1, 4), MASKED),  # every query sees the first key alone
        (RAGGED, MASKED),
    ],
)
def test_a_mask_is_recognised(mask, kind):
    assert mask_kind(mask, 4) == kind


@pytest.mark.parametrize("kind", [CAUSAL, FULL, MASKED])
def test_attention_equals_a_plain_softmax(kind):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64)
    allowed = {CAUSAL: torch.ones(4, 4).tril(), FULL: torch.ones(4, 4), MASKED: RAGGED}[kind]
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / 8**0.5
    weights = scores.exp() * allowed
    expected = torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), value)
    torch.testing.assert_close(attend(query, key, value, RAGGED, kind), expected, rtol=1e-12, atol=1e-12)


def test_dropout_zeroes_attention_and_keeps_its_mean():
    torch.manual_seed(0)
    query, key, value = torch.zeros(1, 1, 20000, 8), torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 4, 8)
    seen = attend(query, key, value, None, FULL, dropout_p=0.5)[0, 0, :, 0]
    assert set(seen.tolist()) == {0, 0.5, 1, 1.5, 2} and seen.mean().item() == pytest.approx(1, abs=0.02)


def test_rotation_is_a_complex_product_of_the_two_halves():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.tensor([[0, 1, 1, 1, 2], [0, 1, 2, 3, 70]])
    rotary = RotaryEmbedding(8).double()
    angle = positions[:, None, :, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, *rotary(positions, torch.float64)), expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    rotary = RotaryEmbedding(8).double()

    def score(query_place, key_place):
        turned = (rotate(x, *rotary(torch.tensor([[p]]), x.dtype)) for x, p in ((query, query_place), (key, key_place)))
        return (next(turned) * next(turned)).sum().item()

    assert score(3, 1) == pytest.approx(score(12, 10), rel=1e-9)
    assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-2)
