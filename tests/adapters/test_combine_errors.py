"""What `combine_adapters` refuses, in one error that says everything; nothing is written then."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lora import AdapterError, ConfigError, combine_adapters
from tests.support.combining import DENSE, QKV, adapter_maker

pytestmark = pytest.mark.usefixtures("single_process_group")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def make(tmp_path_factory, single_process_group):
    return adapter_maker(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def pair(make, tmp_path):
    return [shutil.copytree(make(seed, torch.float32), tmp_path / f"copy{seed}") for seed in (0, 1)]


def change(folder, tensors=(), layer=(), **own):
    """Change tensors (None removes one), what the config says about QKV, and what else it says under `sat_lora`."""
    content = load_file(folder / WEIGHTS)
    content = {key: tensor for key, tensor in {**content, **dict(tensors)}.items() if tensor is not None}
    save_file(content, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config["sat_lora"]["layers"][QKV].update(layer)
    config["sat_lora"].update(own)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def assert_refused(folders, out, error, *messages, **arguments):
    with pytest.raises(error) as caught:
        combine_adapters(folders, out, **{"method": "cat", **arguments})
    for message in messages:
        assert re.search(message, str(caught.value)), (message, str(caught.value))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folders": []}, r"a list of at least one adapter folder, got \[\]"),
        ({"folders": "adapter"}, "a list of at least one adapter folder, got 'adapter'"),
        ({"method": "tise", "density": 0.5}, "no method 'tise', did you mean 'ties'. known: cat, linear, svd, ties"),
        ({"method": None}, "no method None"),
        ({"weights": [1.0]}, r"one finite number for each of 2 folders, got \[1.0\]"),
        ({"weights": []}, r"one finite number for each of 2 folders, got \[\]"),
        ({"weights": [1.0, float("nan")]}, r"one finite number for each of 2 folders, got \[1.0, nan\]"),
        ({"weights": [1.0, "2"]}, r"one finite number for each of 2 folders, got \[1.0, '2'\]"),
        ({"method": "ties"}, "ties needs a density"),
        ({"method": "ties", "density": 0}, "density has to be above 0 and at most 1, got 0"),
        ({"method": "ties", "density": 1.5}, "density has to be above 0 and at most 1, got 1.5"),
        ({"method": "ties", "density": float("nan")}, "density has to be above 0 and at most 1, got nan"),
        ({"method": "linear", "density": 0.5}, "density is for ties, linear does not use it"),
        ({"method": "cat", "rank": 4}, "rank is for svd, cat does not use it"),
        ({"method": "svd", "rank": 0}, "rank has to be a whole number of at least 1, got 0"),
        ({"method": "svd", "majority_sign": "frequency"}, "majority_sign is for ties, svd does not use it"),
        ({"method": "ties", "density": 1, "majority_sign": "sum"}, "no majority_sign 'sum', did you mean"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_read(tmp_path, arguments, message):
    arguments = {"folders": ["nowhere", "neither"], **arguments}
    assert_refused(arguments.pop("folders"), tmp_path / "out", ConfigError, message, **arguments)


def test_all_wrong_arguments_are_listed_at_once(tmp_path):
    messages = (
        "at least one adapter folder",
        "no method 'svt', did you mean 'svd'",
        "rank has",
        "density has",
        "exists",
    )
    with pytest.raises(ConfigError) as caught:
        combine_adapters([], tmp_path, method="svt", rank=-1, density=2)
    assert all(message in str(caught.value) for message in messages)


def test_an_existing_folder_is_not_overwritten(pair):
    before = (pair[1] / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        combine_adapters(pair, pair[1], method="cat")
    assert (pair[1] / WEIGHTS).read_bytes() == before


def test_everything_wrong_with_the_adapters_is_listed_at_once(pair, tmp_path, make):
    change(pair[1], base_fingerprint="another")
    third = shutil.copytree(make(2, torch.float32, r=2), tmp_path / "third")
    change(third, {f"{DENSE}.lora_A": None})
    folders = [tmp_path / "nowhere", *pair, third]
    text = assert_refused(
        folders,
        tmp_path / "out",
        AdapterError,
        f"{pair[1]}: trained on a base with other names or shapes than {pair[0]}",
        f"{third}: missing {DENSE}.lora_A",
        rf"{DENSE}: linear wants equal ranks, got \[4, 4, 2\]; svd and cat take any",
        "nowhere is not an adapter folder",
        method="linear",
    )
    assert f"{third}: trained" not in text and "inputs" not in text


def test_dora_magnitudes_and_whole_tensors_of_the_base_are_refused_by_name(make, tmp_path):
    dora = make(0, use_dora=True, target_modules=["query_key_value", "dense"], layers_to_transform="language:0")
    whole = make(1, modules_to_save=["boi"])
    text = assert_refused(
        [dora, whole],
        tmp_path / "out",
        AdapterError,
        f"{dora}: DoRA magnitudes cannot be combined: {DENSE}.lora_magnitude, {QKV}.k.lora_magnitude, {QKV}.q.lora",
        rf"{whole}: whole tensors of the base .* cannot be combined: mixins.eva.boi(;|$)",
    )
    assert "unexpected" not in text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{DENSE}.lora_A": torch.ones(3, 64)}, rf"{DENSE}.lora_A: shape \(3, 64\), the model wants \(4, 64\)"),
        ({f"{DENSE}.lora_A": torch.ones(64)}, rf"{DENSE}.lora_A: shape \(64,\), the model wants \(4, 64\)"),
        ({f"{DENSE}.lora_B": torch.ones(64)}, rf"{DENSE}.lora_B: shape \(64,\), the model wants \(64, 4\)"),
        ({f"{DENSE}.lora_B": torch.ones(63, 4)}, rf"{DENSE}.lora_B: shape \(63, 4\), the model wants \(64, 4\)"),
        ({f"{DENSE}.lora_A": torch.ones(4, 63)}, f"{DENSE}: number of inputs 64 in one adapter, 63 in another"),
        ({f"{DENSE}.lora_A": torch.ones(4, 64, dtype=torch.int64)}, "dtype torch.int64"),
        ({f"{DENSE}.lora_A": torch.full((4, 64), float("inf"))}, "holds values that are not finite"),
        ({f"{DENSE}.lora_C": torch.ones(4)}, f"unexpected {DENSE}.lora_C"),
        ({f"{DENSE}.lora_magnitude": torch.ones(64)}, f"unexpected {DENSE}.lora_magnitude"),
    ],
)
def test_a_damaged_adapter_is_refused(pair, tmp_path, tensors, message):
    change(pair[1], tensors)
    assert_refused(pair, tmp_path / "out", AdapterError, message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "row"}, f"{QKV}: kind column in one adapter, row in another"),
        (
            {"rows": [[0, 64], [128, 192], [64, 128]]},
            rf"{QKV}: rows of k \(64, 128\) in one adapter, \(128, 192\) in another; "
            rf"{QKV}: rows of v \(128, 192\) in one adapter, \(64, 128\) in another",
        ),
        ({"slots": [], "rows": [[0, 192]]}, f"{QKV}: cut into slots in one adapter and not in another"),
        ({"r": 0}, f"copy1/adapter_config.json: .*{QKV}: .*r 0"),
        ({"scale": float("nan")}, "copy1/adapter_config.json: .*NaN is no JSON"),
    ],
)
def test_layers_that_do_not_go_together_are_refused(pair, tmp_path, entry, message):
    change(pair[1], layer=entry)
    assert_refused(pair, tmp_path / "out", AdapterError, message)


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties"])
def test_a_combination_that_overflows_is_refused(pair, tmp_path, method):
    for folder in pair:
        change(folder, {f"{DENSE}.lora_A": torch.full((4, 64), 3e38), f"{DENSE}.lora_B": torch.full((64, 4), 3e38)})
    if method in ("linear", "svd"):
        assert_refused(pair, tmp_path / "out", AdapterError, DENSE, method=method)
    text = assert_refused(pair, tmp_path / "out", AdapterError, weights=[1e308, 1.0])
    assert f"{DENSE}: weight times scale is not finite" in text


def test_an_adapter_of_nothing_is_refused(pair, tmp_path):
    change(pair[1], dict.fromkeys(load_file(pair[1] / WEIGHTS)), layers={})
    assert_refused(pair, tmp_path / "out", AdapterError, f"{pair[1]}: adapts nothing")


def test_a_write_that_fails_leaves_nothing(pair, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    assert_refused(pair, tmp_path / "out", AdapterError, "out: the combined adapter could not be written: .*No space")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folder.name for folder in pair)
