"""Training on a quantised base in each layout, against one process on the decoded weights: cells of the matrix.

More of them: `python -m tests.distributed.matrix --quantize nf4`, or int8.
"""

import itertools

import pytest
import torch

from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights, shardings_of
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.lora.live_base import identity_of_model
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.sharding import model_parallel_layout
from sat_lora.quantization.config import Quantization
from sat_lora.quantization.weights.layers import quantized_weights
from tests.distributed.matrix import BOUNDS, Cell, errors_of
from tests.support.ranks import run_ranks
from tests.support.tiny import WIDE, tiny_model

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


def test_a_slice_has_the_values_of_the_whole_wherever_it_is_encoded(tmp_path, single_process_group):
    """Of a folder that was quantised before, also where the cut leaves rows of 96, which blocks of 64 do not divide."""
    config = {**WIDE, "inner_hidden_size": 192}
    save_weights(tmp_path / "base", config, tiny_model(config=config).state_dict())
    quantize_base(tmp_path / "base", tmp_path / "nf4", Quantization())
    model, _ = load_cogvlm(tmp_path / "nf4")
    whole = {name: weight.decoded() for name, weight in quantized_weights(model)}
    uneven = sorted(name for name in whole if "4h_to_h" in name and not name.startswith("mixins.eva."))
    for written, encoded, identity in run_ranks(slices, 2, tmp_path, whole):
        assert written == ([], sorted(whole))
        assert encoded == (uneven, sorted(whole))  # blocks of 32 there
        assert identity == identity_of_model(model).digest


def slices(folder, whole):
    """(names of weights that are not the whole's slices, names of all) of the two ways to load; the base's digest."""
    init_model_parallel(init_distributed(), 2)
    results = []
    for name, quantize in (("nf4", None), ("base", Quantization())):
        model, _ = load_cogvlm(folder / name, model_parallel_size=2, quantize=quantize)
        shardings = shardings_of(model)
        weights = dict(quantized_weights(model))
        wrong = [
            layer
            for layer, weight in weights.items()
            if not torch.equal(
                weight.decoded(), shardings[f"{layer}.weight"].shard(whole[layer], *model_parallel_layout())
            )
        ]
        results.append((sorted(wrong), sorted(weights)))
    return *results, identity_of_model(model).digest


@pytest.mark.matrix
@pytest.mark.parametrize("cell", [cell for cell in LONG if cell not in SELECTED], ids=str)
def test_training_is_so_in_every_layout(cell):
    assert_within_bounds(cell)
