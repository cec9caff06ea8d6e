"""A selection of the matrix's cells that holds every value of every dimension, and every pair of values that is risky.

The whole matrix: `make test-matrix`.
"""

import pytest

from tests.distributed.matrix import BOUNDS, Cell, errors_of

SELECTED = [
    Cell(1, 2, 0, False, "fp32", "text-only"),
    Cell(1, 2, 1, False, "fp32", "one text-only"),
    Cell(1, 2, 2, True, "bf16", "one text-only"),
    Cell(2, 1, 0, True, "fp32", "images"),
    Cell(2, 1, 3, False, "bf16", "text-only"),
    Cell(2, 2, 2, True, "fp32", "one text-only"),
]


@pytest.mark.parametrize("cell", SELECTED, ids=str)
def test_training_is_that_of_one_process_on_the_joined_batch(cell):
    errors = errors_of(cell)
    assert {name for name in BOUNDS if not errors[name] <= cell.bound(name)} == set(), errors
