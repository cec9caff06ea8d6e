"""Training on a quantised base in each layout, against one process on the decoded weights: cells of the matrix.

More of them: `python -m tests.distributed.matrix --quantize nf4`, or int8.
"""

import itertools
import json

import pytest
import torch

from sat_lora import AdapterError, add_lora, save_adapter
from sat_lora.adapters.format import WEIGHTS
from sat_lora.adapters.inspect import describe_adapter, inspect_adapter
from sat_lora.adapters.merge import merge_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.adapters.verify import verify_merge
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights, shardings_of
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.lora.live_base import identity_of_model
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.sharding import model_parallel_layout, over_model_parallel
from sat_lora.quantization.config import NAMES, Quantization
from sat_lora.quantized.layers import bytes_of, quantized_weights
from sat_lora.training.steps.engine import set_up_deepspeed, start_engine
from tests.distributed.matrix import BOUNDS, Cell, errors_of
from tests.support.ranks import run_ranks
from tests.support.tiny import WIDE, fill_adapters, logits_of, tiny_batch, tiny_model
from tests.support.training_runs import adapter_values, engine_config, mixed_batch, sgd, step_together, worst_error

BATCH = "one text-only"
SELECTED = [Cell(1, 2, 3, True, "fp32", BATCH, "nf4")]
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


SLICES = [(192, NAMES[0], {}), *(pytest.param(*case, marks=pytest.mark.matrix) for case in (
    (192, NAMES[1], {}),
    (96, NAMES[0], {}),  # slices of 48: no block divides them, and they stay whole
    (192, NAMES[0], dict(init_lora_weights="loftq", loftq_iter=2)),
))]  # fmt: skip


@pytest.mark.parametrize(("inner", "scheme", "fields"), SLICES)
def test_onto_what_was_trained_are_the_slices_in_their_own_blocks(
    inner, scheme, fields, tmp_path, single_process_group
):
    config = {**WIDE, "inner_hidden_size": inner}
    save_weights(tmp_path / "base", config, tiny_model(config=config).state_dict())
    quantization = Quantization(scheme=scheme)
    arrays = run_ranks(adapter_beside_slices, 2, tmp_path, quantization, fields)[0]
    held = {name: torch.from_numpy(array) for name, array in arrays.items()}
    whole = {n: w.decoded() for n, w in quantized_weights(load_cogvlm(tmp_path / "base", quantize=quantization)[0])}
    differing = {name for name in whole if name not in held or not torch.equal(whole[name], held[name])}
    assert any("4h_to_h" in name for name in differing)
    note = read_adapter(tmp_path / "adapter").base_quantization
    assert note["slices"] == 2
    about = describe_adapter(inspect_adapter(tmp_path / "adapter"))
    assert f"quantised to {scheme}: all-linear, in the blocks of 2 model-parallel slices" in about
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", onto="trained")
    assert verify_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", onto="trained").problems == ()
    base, merged = (load_cogvlm(tmp_path / name)[0].state_dict() for name in ("base", "merged"))
    saved = read_adapter(tmp_path / "adapter")
    for name, weight in merged.items():
        layer = name.removesuffix(".weight")
        beside = held.get(layer, base[name]) if layer != name else base[name]
        if layer not in saved.layers or layer == name:
            assert torch.equal(weight, beside)
            continue
        delta = saved.delta_of(layer)
        rank = saved.layers[layer].r
        products = [
            s_b @ s_a
            for s_a, s_b in zip(delta.a.split(rank), delta.b.split([e - b for b, e in saved.layers[layer].rows]))
        ]
        torch.testing.assert_close(weight, beside + delta.scale * torch.cat(products), rtol=1e-5, atol=1e-6)
    quantize_base(tmp_path / "base", tmp_path / "folder", quantization)
    with pytest.raises(AdapterError, match="slices, and .*folder is quantised to |was begun by loftq"):
        merge_adapter(tmp_path / "folder", tmp_path / "adapter", tmp_path / "none", onto="trained")
    write_note(tmp_path / "adapter", {name: value for name, value in note.items() if name != "slices"})  # of before
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "before", onto="trained")


def adapter_beside_slices(folder, quantization, fields):
    """An adapter in FOLDER/adapter, beside slices that two ranks have encoded; these decoded, as whole tensors."""
    init_model_parallel(init_distributed(), 2)
    model, _ = load_cogvlm(folder / "base", model_parallel_size=2, quantize=quantization)
    add_lora(model, r=2, target_modules=["language-mlp", "language-attention"], **fields)
    fill_adapters(model)
    save_adapter(model, folder / "adapter")
    shardings = shardings_of(model)
    return {
        name: over_model_parallel(weight.decoded(), shardings[f"{name}.weight"]).numpy()
        for name, weight in quantized_weights(model)
    }


@pytest.mark.parametrize("slices", [0, -1, True, "2", 1.5, None, [2], 3, 10**9], ids=str)
def test_slices_that_there_are_not_are_an_error(slices, tmp_path, single_process_group):
    save_weights(tmp_path / "base", WIDE, tiny_model(config=WIDE).state_dict())
    model, _ = load_cogvlm(tmp_path / "base", quantize=Quantization())
    add_lora(model, r=2)
    save_adapter(model, tmp_path / "adapter")
    note = read_adapter(tmp_path / "adapter").base_quantization
    assert "slices" not in note  # as in files of before
    write_note(tmp_path / "adapter", {**note, "slices": slices})
    with pytest.raises(AdapterError, match="--onto trained: .* is not known here: "):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", onto="trained")
    assert "quantised to nf4" in describe_adapter(inspect_adapter(tmp_path / "adapter"))


def write_note(adapter, note):
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    content["sat_lora"]["base_quantization"] = note
    file.write_text(json.dumps(content))


LOFTQ = dict(r=4, init_lora_weights="loftq", loftq_iter=2, target_modules=["language-attention", "language-mlp"])


def loftq_steps(base, stage, model_parallel, folder):
    """Adapters at the beginning, and after three steps of plain SGD, in FOLDER; the logits then."""
    world = init_model_parallel(init_distributed(), model_parallel)
    set_up_deepspeed()
    zero = engine_config(3, 2) if stage == 3 else None
    model, _ = load_cogvlm(base, model_parallel_size=model_parallel, quantize=Quantization(), zero_config=zero)
    add_lora(model, **LOFTQ)
    save_adapter(model, f"{folder}/fresh")
    engine = start_engine(model.train(), sgd(model, 0.05), engine_config(stage, 2))
    for step in range(3):
        step_together(engine, [mixed_batch(world.data_parallel_rank, step)], world)
    save_adapter(engine.module, f"{folder}/trained")
    with torch.no_grad():
        return logits_of(engine.module.eval(), tiny_batch()).numpy()


@pytest.mark.parametrize(
    ("stage", "model_parallel"),
    [(3, 2), *(pytest.param(*layout, marks=pytest.mark.matrix) for layout in ((0, 2), (0, 1), (3, 1), (2, 1)))],
)
def test_loftq_begins_and_trains_alike_in_each_layout(stage, model_parallel, tmp_path):
    save_weights(tmp_path / "base", WIDE, tiny_model(config=WIDE).state_dict())
    data_parallel = 2 // model_parallel
    alone = run_ranks(loftq_steps, data_parallel, tmp_path / "base", 0, 1, str(tmp_path / "0"))[0]
    cut = run_ranks(loftq_steps, 2, tmp_path / "base", stage, model_parallel, str(tmp_path / "1"))[0]
    fresh = [(tmp_path / side / "fresh" / WEIGHTS).read_bytes() for side in ("0", "1")]
    assert fresh[0] == fresh[1]
    trained = [{k: t.numpy() for k, t in read_adapter(tmp_path / side / "trained").tensors.items()} for side in "01"]
    assert worst_error(trained[1], trained[0]) < 1e-4
    assert abs(cut - alone).max() < 1e-4 * abs(alone).max()


def partitioned_and_whole_steps(base, scheme):
    """Of quantised weights whole on each rank under ZeRO-3, and of partitioned ones: (bytes of them here, results)."""
    world = init_model_parallel(init_distributed())
    set_up_deepspeed()
    found = []
    for is_partitioned in (False, True):
        model, _ = load_cogvlm(
            base,
            checkpoint_activations=True,
            quantize=Quantization(scheme=scheme),
            zero_config=engine_config(3, 2),
            partition_quantized=is_partitioned,
        )
        held = sum(bytes_of(weight) for _, weight in quantized_weights(model))
        add_lora(model, **LOFTQ)
        engine = start_engine(model.train(), sgd(model, 0.05), engine_config(3, 2))
        losses = [
            step_together(engine, [mixed_batch(world.data_parallel_rank, step)], world)  # a rank of text alone
            for step in range(2)
        ]
        with torch.no_grad():
            logits = logits_of(engine.module.eval(), tiny_batch()).numpy()
        found.append((held, losses, adapter_values(engine.module), logits))
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", NAMES)
def test_partitioned_weights_train_as_whole_ones_bit_for_bit(scheme, tmp_path):
    save_weights(tmp_path / "base", WIDE, tiny_model(config=WIDE).state_dict())
    for whole, partitioned in run_ranks(partitioned_and_whole_steps, 2, tmp_path / "base", scheme):
        assert partitioned[0] == whole[0] / 2
        assert partitioned[1] == whole[1]
        assert all((partitioned[2][name] == values).all() for name, values in whole[2].items())
        assert (partitioned[3] == whole[3]).all()


@pytest.mark.matrix
@pytest.mark.parametrize("cell", [cell for cell in LONG if cell not in SELECTED], ids=str)
def test_training_is_so_in_every_layout(cell):
    assert_within_bounds(cell)
