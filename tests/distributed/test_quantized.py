"""Training on a quantised base in each layout, against one process on the decoded weights: cells of the matrix.

More of them: `python -m tests.distributed.matrix --quantize nf4`, or int8.
"""

import itertools

import pytest

from tests.distributed.matrix import BOUNDS, Cell, errors_of

BATCH = "one text-only"
SELECTED = [Cell(2, 1, 3, True, "fp32", BATCH, "nf4")]
LAYOUTS = [(1, 2), (2, 1)]
LONG = [
    Cell(*layout, stage, is_checkpointed, "fp32", BATCH, "nf4")
    for layout, stage, is_checkpointed in itertools.product(LAYOUTS, range(4), (False, True))
]
LONG += [Cell(*layout, stage, True, "fp32", BATCH, "int8") for layout, stage in itertools.product(LAYOUTS, range(4))]
LONG += [Cell(*layout, stage, True, "bf16", BATCH, "nf4") for layout, stage in itertools.product(LAYOUTS, range(4))]


def assert_within_bounds(cell: Cell) -> None:
    errors = errors_of(cell)
    assert {name for name in BOUNDS if not errors[name] <= cell.bound(name)} == set(), errors


@pytest.mark.parametrize("cell", SELECTED, ids=str)
def test_training_is_that_of_one_process_on_the_decoded_weights(cell):
    assert_within_bounds(cell)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", [cell for cell in LONG if cell not in SELECTED], ids=str)
def test_training_is_so_in_every_layout(cell):
    assert_within_bounds(cell)
