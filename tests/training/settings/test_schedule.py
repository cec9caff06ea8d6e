import math

import pytest

from sat_lora.training.settings.schedule import DECAY_STYLES, learning_rate_factor, total_steps, warmup_steps


def factors(**settings):
    return [learning_rate_factor(step, **settings) for step in range(settings["total_steps"])]


def test_warmup_is_linear_and_ends_at_the_peak():
    for style in DECAY_STYLES:
        got = factors(total_steps=20, warmup_steps=4, style=style)
        assert got[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_as_its_formula_says():
    got = factors(total_steps=12, warmup_steps=2, style="cosine", floor=0.1)
    assert got[7] == pytest.approx(0.1 + 0.9 * 0.5)
    assert got[11] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.9)) / 2)


def test_linear_falls_by_equal_steps():
    got = factors(total_steps=10, warmup_steps=0, style="linear")
    assert got == pytest.approx([1 - step / 10 for step in range(10)])


def test_constant_stays():
    assert factors(total_steps=5, warmup_steps=0, style="constant") == [1.0] * 5


@pytest.mark.parametrize("style", DECAY_STYLES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 10])
def test_every_factor_is_above_zero_and_at_most_one(style, warmup):
    got = factors(total_steps=10, warmup_steps=warmup, style=style)
    assert all(0 < factor <= 1 for factor in got)
    assert got[warmup:] == sorted(got[warmup:], reverse=True)


def test_a_step_past_the_end_keeps_the_last_factor():
    settings = dict(total_steps=10, warmup_steps=2, style="cosine")
    assert learning_rate_factor(500, **settings) == learning_rate_factor(9, **settings) > 0


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="--lr-decay-style: got 'step', wanted one of cosine, linear, constant"):
        learning_rate_factor(0, total_steps=1, warmup_steps=0, style="step")


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.02, 16), (0.0001, 1), (30.0, 30), (1.0, 1), (9000, 800)])
def test_warmup_below_one_is_a_share(warmup, steps):
    assert warmup_steps(warmup, 800) == steps


def test_steps_come_from_iterations_or_else_from_epochs():
    data = dict(samples=1000, batch_size=8, gradient_accumulation_steps=2, data_parallel_size=4)
    assert total_steps(train_iters=5, epochs=None, **data) == 5
    assert total_steps(train_iters=None, epochs=2, **data) == 32  # 2000 / 64, rounded up
    assert total_steps(train_iters=None, epochs=None, **data) == 16
    assert total_steps(train_iters=None, epochs=0.001, **data) == 1
