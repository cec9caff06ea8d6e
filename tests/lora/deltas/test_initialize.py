"""How A and B begin: sizes, seeds and formulas; `test_against_peft` compares them with PEFT's."""

import pytest
import torch

from sat_lora.lora.deltas.initialize import initial_delta

WEIGHT = torch.randn(10, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def factors(scheme, *, slots=1, rank=4, scale=1.5, is_embedding=False, seed=3, weight=WEIGHT):
    weights, shapes = [lambda: weight] * slots, [tuple(weight.shape)] * slots
    delta = initial_delta(scheme, weights, shapes, rank=rank, scale=scale, is_embedding=is_embedding, seed=seed)
    assert delta.scale == scale
    return delta.a, delta.b


@pytest.mark.parametrize("scheme", ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_pair_of_each_slot_lies_behind_the_one_before(scheme, slots):
    a, b = factors(scheme, slots=slots)
    assert a.shape == (4 * slots, 12) and b.shape == (10 * slots, 4)
    again = factors(scheme, slots=slots)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    if scheme not in ("pissa", "olora"):
        assert not torch.equal(a, factors(scheme, slots=slots, seed=4)[0])


def test_drawn_factors_have_their_sizes_and_nothing_is_added_at_first():
    wide = torch.empty(10, 400)
    for scheme, deviation in (("kaiming", (1 / 400 / 3) ** 0.5), ("gaussian", 1 / 40)):
        a, b = factors(scheme, rank=40, weight=wide)
        assert not b.any() and a.std() == pytest.approx(deviation, rel=0.05)
        assert scheme == "gaussian" or 0.95 / 20 < a.abs().max() <= 1 / 20
        a, b = factors(scheme, rank=40, weight=wide, is_embedding=True)
        assert not a.any() and b.std() == pytest.approx(1, rel=0.2)


def test_orthogonal_factors_are_a_tenth_of_what_is_drawn_and_have_no_product():
    a, b = factors("orthogonal", rank=40, weight=torch.empty(500, 600))
    assert (b @ a).abs().max() < 1e-5
    # Half as many numbers are drawn as there are entries, and each is turned by rows of length one.
    for factor in (a, b):
        assert factor.pow(2).mean().sqrt() == pytest.approx(0.1 / 2**0.5, rel=0.03)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_pissa_is_the_best_approximation_split_evenly(scale):
    a, b = factors("pissa", scale=scale)
    u, singular, vh = torch.linalg.svd(WEIGHT)
    torch.testing.assert_close(scale * b @ a, u[:, :4] * singular[:4] @ vh[:4], rtol=1e-10, atol=1e-10)
    lengths = (singular[:4] / scale).sqrt()
    torch.testing.assert_close(a.norm(dim=1), lengths)
    torch.testing.assert_close(b.norm(dim=0), lengths)
    rough = factors("pissa_niter_16", scale=scale)
    torch.testing.assert_close(scale * rough[1] @ rough[0], scale * b @ a, rtol=1e-3, atol=1e-3)


def test_pissa_with_steps_leaves_torchs_own_generator_as_it_was():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    factors("pissa_niter_1")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_olora_begins_with_the_first_rows_and_columns():
    a, b = factors("olora")
    q, r = torch.linalg.qr(WEIGHT)
    assert torch.equal(a, r[:4]) and torch.equal(b, q[:, :4]) and a.is_contiguous() and b.is_contiguous()


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_of_a_half_precision_weight_the_factors_are_float32(scheme):
    assert {factor.dtype for factor in factors(scheme, weight=WEIGHT.bfloat16())} == {torch.float32}
    assert {factor.dtype for factor in factors(scheme)} == {torch.float64}
