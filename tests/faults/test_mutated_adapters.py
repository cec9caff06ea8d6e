"""Adapter files with random damage."""

import pytest

from tests.support.mutated_adapters import count_outcomes


@pytest.mark.parametrize(
    "times", [300, pytest.param(10_000, marks=[pytest.mark.matrix, pytest.mark.timeout(900)])], ids=str
)
def test_no_damage_gives_another_exception_or_harms_the_model(tmp_path, pristine, times):
    outcomes = count_outcomes(tmp_path, pristine, times)
    assert outcomes["loaded"] > times // 50 and outcomes["refused"] > times // 2
    assert outcomes["took over a second"] == 0
