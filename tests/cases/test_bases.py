"""A base is known by its content: copies of it in any layout and precision are it, and one that was trained is not."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from sat_lora import AdapterError, CheckpointError, add_lora, load_adapter, save_adapter
from sat_lora.adapters.combine import combine_adapters
from sat_lora.adapters.merge import merge_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.hugging_face_folder import ROTARY
from sat_lora.cogvlm.checkpoints.hugging_face_writer import make_hugging_face_weights
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.lora.base_identity import MOST, fingerprint_of, identity_of, positions, same_values
from sat_lora.lora.live_base import identity_of_model
from sat_lora.training.same_base import base_of_run
from tests.support.configs import config_of
from tests.support.sat_files import cut_by_sat, write_step
from tests.support.tiny import CONFIG, fill_adapters, tiny_model

FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def model(single_process_group):
    return tiny_model()


def cast(state, *dtypes):
    for dtype in dtypes:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return state


def identity(state):
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return identity_of(shapes, lambda name, index: state[name].reshape(-1)[index])


@pytest.mark.parametrize("one", FORMATS, ids=str)
@pytest.mark.parametrize("other", FORMATS, ids=str)
def test_copies_in_other_formats_are_the_same_base(model, one, other):
    first, second = (identity(cast(model.state_dict(), dtype)) for dtype in (one, other))
    assert first.difference(second) is None and second.difference(first) is None


@pytest.mark.parametrize(
    "way",
    [[torch.float16, torch.bfloat16], [torch.bfloat16, torch.float32], [torch.float16, torch.bfloat16, torch.float32],
     [torch.bfloat16, torch.float16]],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("other", FORMATS[:3], ids=str)
def test_copies_of_copies_are_the_same_base(model, way, other):
    """Rounded twice, by way of float16 one bfloat16 value in sixteen is another than when it is rounded once."""
    assert identity(cast(model.state_dict(), *way)).difference(identity(cast(model.state_dict(), other))) is None


def trained(state, rate, seed=0, share=0.1):
    """One step of Adam at that rate, which moves each value by it, on one tensor in ten."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in sorted(state) if state[name].dim() > 1]
    moved = names[:: round(1 / share)]
    return state | {
        name: state[name] + rate * torch.randn(state[name].shape, generator=generator).sign() for name in moved
    }


@pytest.mark.parametrize("dtype", FORMATS[:3], ids=str)
@pytest.mark.parametrize("other", FORMATS[:3], ids=str)
@pytest.mark.parametrize("rate, seed", [(1e-3, 0), (1e-4, 1), (1e-4, 2)])
def test_a_step_of_training_makes_another_base(model, dtype, other, rate, seed):
    before, after = model.state_dict(), trained(model.state_dict(), rate, seed)
    assert "other values in" in identity(cast(before, dtype)).difference(identity(cast(after, other)))


def test_a_step_in_float32_at_a_hundred_thousandth_is_seen(model):
    before, after = model.state_dict(), trained(model.state_dict(), 1e-5)
    assert identity(before).difference(identity(after)) is not None


def test_another_seed_is_another_base(model):
    assert "other values" in identity(model.state_dict()).difference(identity(tiny_model(seed=1).state_dict()))


def test_the_smallest_change_that_half_precision_cannot_see_is_no_other_base():
    one = torch.tensor([1.0, 0.0, 3e-8, float("nan"), 1e5, 65504.0])
    other = torch.tensor([1.0 + 2**-8, -0.0, 0.0, float("nan"), float("inf"), 65504.0])
    assert same_values(one, other.to(torch.float16).float()).all()
    assert not same_values(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.02, -1.0, 1e-3])).any()
    assert not same_values(torch.tensor([1.1]), torch.tensor([1.1 + 2**-21])).any()


def test_no_more_than_a_few_values_of_a_tensor_are_read_and_of_a_small_one_all():
    assert positions((5, 3), MOST).tolist() == [*range(15)]
    assert len(positions((4096, 4096), MOST)) == MOST and int(positions((1 << 40,), MOST).max()) > 1 << 32
    assert positions((), MOST).tolist() == [0]


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """The same weights as SAT folders of one and two ranks and a Hugging Face folder, in several formats."""
    root, state = tmp_path_factory.mktemp("bases"), model.state_dict()
    save_weights(root / "one", CONFIG, state)
    (root / "two").mkdir()
    shutil.copy(root / "one" / "model_config.json", root / "two")
    write_step(root / "two", *({"module": cast(part, torch.bfloat16)} for part in cut_by_sat(model, 2)))
    (root / "hf").mkdir()
    layout = {name: (tuple(tensor.shape), torch.float16) for name, tensor in state.items()}
    frequencies = state[ROTARY]
    for name, tensor in make_hugging_face_weights(root / "hf", CONFIG, layout, frequencies).items():
        tensor.copy_(state[name])
    save_weights(root / "other", CONFIG, trained(state, 1e-3))
    return root


def test_layouts_of_one_base_are_that_base(model, folders):
    live = identity_of_model(model)
    for name in ("one", "two", "hf"):
        base = BaseWeights(folders / name).identity
        assert live.difference(base) is None and base.name == name and base.family == live.family == "CogVLM"
        assert base.fingerprint == live.fingerprint == fingerprint_of(live.shapes)
    assert live.difference(BaseWeights(folders / "other").identity)


def test_trained_and_merged_parameters_count_as_they_were_before(model):
    changed = tiny_model()
    (mixin, *_) = add_lora(changed, r=2, target_modules=["attention.dense"], modules_to_save=["linear_proj"])
    fill_adapters(changed)
    with torch.no_grad():
        for tensor in mixin.trained.tensors.values():
            tensor.add_(1)
    expected = identity_of_model(model)
    assert torch.equal(identity_of_model(changed).values, expected.values)
    for one in {module for module in changed.modules() if type(module) is type(mixin)}:
        one.merge()
    assert torch.equal(identity_of_model(changed).values, expected.values)


@pytest.fixture(scope="module")
def adapter(folders):
    model = tiny_model()
    model.base_name = "cogvlm-base"
    add_lora(model, r=2, target_modules=["attention.dense"])
    fill_adapters(model)
    save_adapter(model, folders / "adapter")
    return folders / "adapter"


OTHERS = {
    "another seed": lambda: tiny_model(seed=1),
    "one layer trained a little": lambda: changed("transformer.layers.1.mlp.dense_4h_to_h.weight", 1e-4),
    "a vision transformer that was trained": lambda: changed(
        "mixins.eva.vit_model.mixins.patch_embedding.proj.bias", 0.01
    ),
}


def changed(name, by):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(name).add_(by)
    return model


@pytest.mark.parametrize("case", OTHERS)
def test_an_adapter_goes_onto_another_base_only_where_one_insists(adapter, case):
    other = OTHERS[case]()
    with pytest.raises(AdapterError, match="other values in .*cogvlm-base .CogVLM, .* parameters.*--any-base"):
        load_adapter(other, adapter)
    load_adapter(other, adapter, any_base=True)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_an_adapter_goes_onto_its_base_in_any_format(adapter, dtype):
    load_adapter(tiny_model(dtype), adapter)


def test_merging_into_another_base_has_to_be_insisted_on(folders, adapter):
    with pytest.raises(AdapterError, match="--adapter: .*was trained on a base with other values in .* than .*other"):
        merge_adapter(folders / "other", adapter, folders / "out")
    assert not (folders / "out").exists()
    merge_adapter(folders / "other", adapter, folders / "insisted", any_base=True)
    for name in ("one", "two", "hf"):
        merge_adapter(folders / name, adapter, folders / f"merged-{name}")


def test_adapters_of_two_bases_are_not_combined(folders, adapter):
    other = tiny_model(seed=1)
    add_lora(other, r=2, target_modules=["attention.dense"])
    save_adapter(other, folders / "foreign")
    pair = [adapter, folders / "foreign"]
    with pytest.raises(AdapterError, match="trained on a base with other values for .* weights.*cogvlm-base"):
        combine_adapters(pair, folders / "both", method="cat")
    combine_adapters(pair, folders / "both", method="cat", any_base=True)
    assert read_adapter(folders / "both").base.name == "cogvlm-base"


@pytest.mark.parametrize("weights", [[1e38, 1e38], [1e300, 1], [1e39, -1e39]])
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_what_could_not_be_loaded_is_not_combined(folders, adapter, tmp_path, weights, method):
    with pytest.raises(AdapterError, match="its scale would be|not finite|cannot be combined"):
        combine_adapters([adapter, adapter], tmp_path / "out", method=method, weights=weights)
    assert not (tmp_path / "out").exists()


def change_base(folder, source, change):
    shutil.copytree(source, folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    change(content["sat_lora"])
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_an_adapter_that_knows_shapes_alone_loads_with_a_warning(tmp_path, adapter, caplog):
    old = change_base(tmp_path / "old", adapter, lambda content: content.pop("base"))
    with caplog.at_level(logging.WARNING, logger="sat_lora"):
        load_adapter(tiny_model(seed=1), old)
    assert "nobody can say whether a base without a name" in caplog.text


def test_an_adapter_that_knows_shapes_alone_is_combined_with_a_warning(tmp_path, adapter, caplog):
    old = change_base(tmp_path / "old", adapter, lambda content: content.pop("base"))
    with caplog.at_level(logging.WARNING, logger="sat_lora"):
        combine_adapters([adapter, adapter], tmp_path / "known", method="cat")
        assert not caplog.text
        combine_adapters([old, adapter], tmp_path / "both", method="cat")
    assert f"{old} was written by a version" in caplog.text and "whether all of these" in caplog.text


SPOILED = {
    "no object": lambda content: content.update(base=[1]),
    "a name that is a number": lambda content: content["base"].update(name=3),
    "a size that is text": lambda content: content["base"].update(parameters="17B"),
    "values that are no base64": lambda content: content["base"].update(values="???"),
    "values of half a number": lambda content: content["base"].update(values="AAAAAAA="),
    "values that are a list": lambda content: content["base"].update(values=[1.0]),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_record_of_a_base_that_is_none_is_named(tmp_path, adapter, case):
    spoiled = change_base(tmp_path / "spoiled", adapter, SPOILED[case])
    with pytest.raises(AdapterError, match="not an adapter config of sat_lora: .*base"):
        read_adapter(spoiled)


def test_a_record_of_another_length_is_no_traceback(tmp_path, adapter):
    short = change_base(tmp_path / "short", adapter, lambda content: content["base"].update(values="AAAAAA=="))
    with pytest.raises(AdapterError, match="another number of values"):
        load_adapter(tiny_model(), short)


def test_the_name_of_a_base_is_only_shown(adapter):
    saved = read_adapter(adapter)
    assert "\x1b" not in replace(saved.base, name="a\x1b[31m\nerror:").title


def test_a_run_is_not_resumed_on_another_base_unless_one_insists(folders, adapter, tmp_path, single_process_group):
    shutil.copytree(adapter, tmp_path / "run" / "adapter" / "20")
    (tmp_path / "run" / "adapter" / "latest").write_text("20\n")
    options = config_of(from_pretrained=str(folders / "other"), resume=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="--resume: .*other has other values in .* than the base of this run"):
        base_of_run(options)
    assert base_of_run(options.replaced(any_base=True)).name == "other"
    assert base_of_run(options.replaced(from_pretrained=str(folders / "hf"))).name == "hf"
    shutil.rmtree(tmp_path / "run" / "adapter")
    base_of_run(options)
