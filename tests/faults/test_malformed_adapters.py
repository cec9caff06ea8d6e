"""Adapter folders that no writer of ours makes: each is one AdapterError with file and cause, and a model unharmed.

What is wrong with a tensor, a name or a field by itself is in tests/adapters/test_save_load_errors.py.
"""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch

from tests.support.adapter_folders import CONFIG, LINEAR, WEIGHTS, assert_refused, change_config, change_tensors


def weights_of(header, data=b"") -> bytes:
    """A safetensors file of that header (an object or bytes) and those data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def one_tensor(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> bytes:
    return weights_of({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(16))


TWO_OVERLAP = {k: {"dtype": "F32", "shape": [2], "data_offsets": o} for k, o in (("x", [0, 8]), ("y", [4, 12]))}

WEIGHT_BYTES = {
    "empty": b"",
    "shorter than its length field": b"\x10\x00\x00",
    "a header longer than the file": struct.pack("<Q", 2**20) + b"{}",
    "a header of 2**40 bytes": struct.pack("<Q", 2**40) + b"{}",
    "a header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header that is no JSON": weights_of(b"no json at all"),
    "a header that is a list": weights_of([]),
    "a header nested 50,000 deep": weights_of(b"[" * 50_000),
    "a header that is not UTF-8": weights_of(b'{"\xff\xfe": 1}'),
    "overlapping offsets": weights_of(TWO_OVERLAP, bytes(12)),
    "offsets beyond the file": one_tensor(offsets=(0, 2**40), shape=(2**19, 2**19)),
    "offsets that run backwards": one_tensor(offsets=(16, 0)),
    "a hole before the data": one_tensor(shape=(2,), offsets=(8, 16)),
    "a shape of other size than its bytes": one_tensor(shape=(3, 3)),
    "a shape whose product overflows": one_tensor(shape=(2**33, 2**33)),
    "a negative shape": one_tensor(shape=(-2, -2)),
    "an unknown dtype": one_tensor(dtype="F31"),
    "bytes behind the data": one_tensor() + b"more",
    "a pickle under the name": pickle.dumps({"x": [1.0]}),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("case", WEIGHT_BYTES)
def test_bytes_that_are_no_safetensors_are_named(tmp_path, pristine, fresh, case):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    (adapter / WEIGHTS).write_bytes(WEIGHT_BYTES[case])
    assert_refused(fresh, adapter, f"{WEIGHTS}: cannot be read as safetensors: ")


OTHER_DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint64, torch.int64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_a_tensor_of_another_dtype_than_adapters_have_is_named(tmp_path, pristine, fresh, dtype):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    change_tensors(adapter, lambda tensors: tensors.update({f"{LINEAR}.lora_A": torch.zeros(4, 64, dtype=dtype)}))
    assert_refused(fresh, adapter, f"{LINEAR}.lora_A: dtype {dtype}, one of float32, .* is wanted")


@pytest.mark.parametrize("part", range(1, 12))
def test_a_weight_file_cut_anywhere_is_named(tmp_path, pristine, fresh, part):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: len(content) * part // 12])
    assert_refused(fresh, adapter, f"{WEIGHTS}: cannot be read as safetensors: ")


def _layer(**values):
    return lambda config: config["sat_lora"]["layers"][LINEAR].update(values)


def _top(**values):
    return lambda config: config.update(values)


NOT_OURS = f"{CONFIG}: not an adapter config of sat_lora: "
CONFIG_VALUES = {
    "a rank that is text": (_layer(r="4"), NOT_OURS + ".*r '4'"),
    "a rank that is no whole number": (_layer(r=4.5), NOT_OURS + ".*r 4.5"),
    "a rank of zero": (_layer(r=0), NOT_OURS + ".*r 0"),
    "a rank of 4,000 digits": (_layer(r=10**4000), "lora_A: shape"),
    "a scale that is text": (_layer(scale="2"), NOT_OURS + ".*scale '2'"),
    "a scale of 1,000 digits": (_layer(scale=10**999), NOT_OURS + ".*scale 1000"),
    "a scale that is not a number": (_layer(scale=float("nan")), NOT_OURS + ".*NaN is no JSON"),
    "a scale beyond float32": (_layer(scale=1e300), NOT_OURS + ".*scale 1e.300"),
    "rows that run backwards": (_layer(rows=[[64, 0]]), NOT_OURS + ".*rows"),
    "rows of three numbers": (_layer(rows=[[0, 1, 2]]), NOT_OURS + ".*unpack"),
    "the same slot twice": (_layer(slots=["q", "q"], rows=[[0, 64]] * 2), NOT_OURS + ".*slots"),
    "slots that are text": (_layer(slots="q"), NOT_OURS + ".*list of texts"),
    "trained names that are text": (lambda c: c["sat_lora"].update(trained="boi"), NOT_OURS + ".*list of texts"),
    "an alpha of infinity": (_top(lora_alpha=float("inf")), NOT_OURS + ".*Infinity is no JSON"),
    "an alpha of 1,000 digits": (_top(lora_alpha=10**999), "lora_alpha has to be a finite number"),
    "a seed that is text": (_top(seed="7"), "seed has to be a whole number"),
    "a field named like an argument": (_top(cls=1), "there is no field 'cls'"),
    "a field named self": (_top(self=1), "there is no field 'self'"),
    "a pattern that repeats too often": (_top(rank_pattern={"a{99999999999}": 4}), "is not a regular expression"),
    "a range of 10**12 layers": (_top(layers_to_transform="0-1000000000000"), "is beyond 10000 layers"),
    "an initialisation that takes from the base": (_top(init_lora_weights="pissa"), "but the file is a plain LoRA"),
    "a weight trained whole and adapted": (
        lambda c: c["sat_lora"].update(trained=[f"{LINEAR}.weight"]),
        f"missing {LINEAR}.weight",
    ),
}


@pytest.mark.parametrize("case", CONFIG_VALUES)
def test_a_value_that_no_config_has_is_named(tmp_path, pristine, fresh, case):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    change, message = CONFIG_VALUES[case]
    change_config(adapter, change)
    assert_refused(fresh, adapter, message)


CONFIG_BYTES = {
    "nested 100,000 deep": b"[" * 100_000,
    "objects nested 100,000 deep": b'{"a":' * 100_000,
    "a number of a million digits": b'{"r": ' + b"9" * 10**6 + b"}",
    "a pickle": pickle.dumps({"r": 4}),
    "zero bytes": bytes(4096),
}


@pytest.mark.parametrize("case", CONFIG_BYTES)
def test_bytes_that_are_no_config_are_named(tmp_path, pristine, fresh, case):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    (adapter / CONFIG).write_bytes(CONFIG_BYTES[case])
    assert len(assert_refused(fresh, adapter, NOT_OURS)) < 1000


def _link_to_itself(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize(
    "place",
    [os.mkdir, os.mkfifo, _link_to_itself, lambda path: path.symlink_to("nowhere")],
    ids=["a directory", "a pipe", "a link to itself", "a link to nothing"],
)
def test_what_is_no_file_is_not_opened(tmp_path, pristine, fresh, name, place):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    (adapter / name).unlink()
    place(adapter / name)
    assert_refused(fresh, adapter, f"is not an adapter folder: {name} missing")


@pytest.mark.parametrize("place", [_link_to_itself, lambda path: path.touch(), os.mkdir], ids=["loop", "file", "empty"])
def test_what_is_no_folder_is_named(tmp_path, fresh, place):
    place(tmp_path / "adapter")
    assert_refused(fresh, tmp_path / "adapter", "adapter is not an adapter folder: .* missing")
