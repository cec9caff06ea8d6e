"""Writers of adapters that are killed."""

import pytest

from tests.support.kill_saving import kill_saves


@pytest.mark.parametrize(
    "times", [20, pytest.param(200, marks=[pytest.mark.matrix, pytest.mark.timeout(900)])], ids=str
)
def test_a_killed_writer_leaves_the_old_adapter_or_the_new_one(tmp_path, times):
    found = kill_saves(tmp_path, times)
    assert found["adapter 1"] + found["adapter 2"] == times
    assert found["adapter 1"] > 0 and found["adapter 2"] > 0 and found["leftovers"] > times // 4
