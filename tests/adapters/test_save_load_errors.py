"""Loading an adapter is strict: one error that says everything, and a model that is left as it was."""

import copy
import shutil

import pytest
import torch

from sat_lora import add_lora
from sat_lora.cogvlm.network.model import build_cogvlm
from tests.support.adapter_folders import (
    CONFIG,
    LINEAR,
    WEIGHTS,
    assert_refused,
    change_config,
    change_tensors,
    write_tiny_adapter,
)
from tests.support.tiny import CONFIG as SIZES
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, single_process_group):
    return write_tiny_adapter(tmp_path_factory.mktemp("pristine") / "adapter")


@pytest.fixture
def adapter(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "adapter")


@pytest.fixture(scope="module")
def fresh(single_process_group):
    return tiny_model()


def _not_finite(tensors):
    tensors[f"{LINEAR}.lora_B"][3, 1] = float("nan")


WRONG_TENSORS = {
    "missing": (lambda t: t.pop(f"{LINEAR}.lora_A"), f"missing {LINEAR}.lora_A"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(2)), "unexpected extra"),
    "shape": (
        lambda t: t.update({f"{LINEAR}.lora_B": torch.zeros(64, 5)}),
        rf"{LINEAR}.lora_B: shape \(64, 5\), the model wants \(64, 4\)",
    ),
    "transposed": (lambda t: t.update({f"{LINEAR}.lora_A": torch.zeros(64, 4)}), r"the model wants \(4, 64\)"),
    "not finite": (_not_finite, f"{LINEAR}.lora_B: holds values that are not finite"),
    "integer": (
        lambda t: t.update({f"{LINEAR}.lora_A": torch.zeros(4, 64, dtype=torch.int32)}),
        f"{LINEAR}.lora_A: dtype torch.int32, one of float32, .* is wanted",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_wrong_tensor_is_named_and_the_model_left_as_it_was(adapter, fresh, case):
    change, message = WRONG_TENSORS[case]
    change_tensors(adapter, change)
    assert_refused(fresh, adapter, message)


def _set(path, value):
    def change(config):
        *way, last = path
        for key in way:
            config = config[key]
        config[last] = value

    return change


WRONG_CONFIGS = {
    "version": (_set(["sat_lora", "format_version"], 3), "format version 3, this sat_lora reads 2"),
    "unknown field": (_set(["lora_alfa"], 3), "no field 'lora_alfa', did you mean 'lora_alpha'"),
    "wrong value": (_set(["r"], -1), "r has to be a whole number of at least 1, got -1"),
    "no section": (lambda c: c.pop("sat_lora"), "not an adapter config of sat_lora"),
    "section is a list": (_set(["sat_lora"], []), "not an adapter config of sat_lora"),
    "no fingerprint": (lambda c: c["sat_lora"].pop("base_fingerprint"), "not an adapter config.*base_fingerprint"),
    "no layers": (_set(["sat_lora", "layers"], {}), "adapts nothing"),
    "entry without a rank": (
        _set(["sat_lora", "layers", LINEAR], {"scale": 1, "slots": [], "rows": []}),
        "not an adapter config",
    ),
    "unknown linear": (
        _set(
            ["sat_lora", "layers", "transformer.nowhere"],
            {"kind": "row", "r": 4, "scale": 8, "slots": [], "rows": [[0, 9]]},
        ),
        "the model has no layer transformer.nowhere",
    ),
    "slots of a linear without": (_set(["sat_lora", "layers", LINEAR, "slots"], ["q"]), "the layer has"),
    "kind": (_set(["sat_lora", "layers", LINEAR, "kind"], "conv"), f"{LINEAR}: conv rows"),
    "rows": (_set(["sat_lora", "layers", LINEAR, "rows"], [[0, 9]]), f"{LINEAR}: row rows"),
    "slots without rows": (_set(["sat_lora", "layers", LINEAR, "rows"], []), "0 slots, 0 ranges of rows"),
    "unknown parameter": (_set(["sat_lora", "trained"], ["nowhere"]), "the model has no parameter nowhere"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_config_is_named_and_the_model_left_as_it_was(adapter, fresh, case):
    change, message = WRONG_CONFIGS[case]
    change_config(adapter, change)
    assert_refused(fresh, adapter, message)


@pytest.mark.parametrize("text", ["{", "[]", "3", "", b"\xff\xfe\x00"])
def test_a_config_that_is_no_json_object_is_named(adapter, fresh, text):
    (adapter / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(fresh, adapter, "adapter_config.json: not an adapter config of sat_lora")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_weight_file_is_named(adapter, fresh, keep):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:keep])
    assert_refused(fresh, adapter, "adapter_model.safetensors: cannot be read")


def test_a_folder_that_is_no_adapter_says_what_is_missing_and_found(adapter, fresh):
    (adapter / WEIGHTS).rename(adapter / "weights.bin")
    message = assert_refused(fresh, adapter, "is not an adapter folder: adapter_model.safetensors missing")
    assert message.endswith("found: README.md, adapter_config.json, weights.bin")
    assert_refused(fresh, adapter / "nowhere", "missing; found: no such folder")
    assert_refused(fresh, adapter / CONFIG, "is not an adapter folder")


def test_an_adapter_of_another_base_is_refused(adapter):
    """One more layer: every linear of the adapter is there and fits, and still it is another model."""
    other = build_cogvlm({**SIZES, "num_layers": 3})
    message = assert_refused(other, adapter, "1 problem:")
    assert "the base model has other names or shapes than the one this adapter was trained on" in message


def test_shapes_of_another_base_are_listed_with_it(adapter):
    sizes = copy.deepcopy(SIZES)
    sizes["eva_args"]["inner_hidden_size"] = 40
    message = assert_refused(build_cogvlm(sizes), adapter, "other names or shapes")
    assert "vit_model.transformer.layers.0.mlp.dense_4h_to_h.lora_A: shape (4, 72), the model wants (4, 40)" in message


def test_a_mixin_of_another_shape_is_left_alone(adapter):
    model = tiny_model()
    add_lora(model, r=2, target_modules=["language-attention", "vit-mlp"])
    assert_refused(
        model, adapter, rf"{LINEAR}: \(rank, scale, slots\) \(4, .* in the file, \(2, .* the model's adapter"
    )


def test_every_problem_is_listed_at_once(adapter, fresh):
    def spoil(tensors):
        for case in ("missing", "unexpected"):
            WRONG_TENSORS[case][0](tensors)
        _not_finite(tensors)

    change_tensors(adapter, spoil)
    message = assert_refused(fresh, adapter, "does not fit, 3 problems")
    assert all(word in message for word in ("missing", "unexpected", "not finite"))
