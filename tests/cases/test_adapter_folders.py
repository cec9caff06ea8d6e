"""Adapter folders with pointers, configs and tensors that lie or have no end: one error at once, and no name obeyed."""

import json
import os
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from sat_lora import AdapterError, load_adapter
from sat_lora.adapters.inspect import describe_adapter, inspect_adapter
from sat_lora.cli import main
from tests.support.adapter_folders import CONFIG, LINEAR, WEIGHTS, change_config, change_tensors, write_tiny_adapter
from tests.support.tiny import tiny_model

SECONDS = 2.0  # of the processor


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, single_process_group):
    return write_tiny_adapter(tmp_path_factory.mktemp("pristine") / "adapter")


@pytest.fixture(scope="module")
def model(single_process_group):
    return tiny_model()


@pytest.fixture
def adapter(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "adapter")


def sparse(path, size=10 << 30):
    with open(path, "wb") as file:
        file.truncate(size)


def sparse_tensor(path):
    """A file of 10 GB in which the tensors are, by its header, and hardly a byte."""
    shape = [4, (10 << 30) // 16]
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 10 << 30]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (10 << 30))


def rank_of(rank):
    return lambda folder: change_config(folder, lambda c: c["sat_lora"]["layers"][LINEAR].update(r=rank))


def many(count):
    def write(folder):
        places = ((4 * number, 4 * number + 4) for number in range(count))
        entries = {
            f"x{n}.lora_A": {"dtype": "F32", "shape": [1], "data_offsets": place} for n, place in enumerate(places)
        }
        header = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * count))

    return write


def rename(old, new):
    def change(folder):
        change_tensors(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))

    return change


A = f"{LINEAR}.lora_A"
WRONG = {
    "a config of 15 MB": (lambda f: (f / CONFIG).write_text("[" + "[]," * 5_000_000 + "[]]"), "larger than 4 MiB"),
    "a sparse config of 10 GB": (lambda f: sparse(f / CONFIG), "begins with zeros"),
    "a sparse tensor of 10 GB": (lambda f: sparse_tensor(f / WEIGHTS), "bytes are on the disk"),
    "a rank of 10^15": (rank_of(10**15), r"lora_A: shape \(4, 64\), the model wants \(1000000000000000, 64\)"),
    "another rank": (rank_of(3), r"lora_A: shape \(4, 64\), the model wants \(3, 64\)"),
    "100,000 foreign tensors": (many(100_000), r"100000 tensors \(x0.lora_A, .*no more than 50000"),
    "a foreign tensor": (lambda f: change_tensors(f, lambda t: t.update(foreign=torch.ones(2))), "unexpected foreign"),
    "a tensor with a terminal's title": (rename(A, "x\x1b]0;owned\x07"), r"unexpected x\\x1b\]0;owned\\x07"),
    "a tensor of a name of 1 MB": (rename(A, "x" * 10**6), r"unexpected x+ \.\.\."),
    "a layer with a line feed": (
        lambda f: change_config(f, lambda c: c["sat_lora"]["layers"].update({"a\nerror: b\x1b[2J": {"kind": 3}})),
        r"a\\nerror: b\\x1b\[2J: ",
    ),
    "a pointer of git LFS": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "lfs"),
    "an answer of a server": (lambda f: (f / CONFIG).write_text("Entry not found"), "a server's answer"),
    "a download that goes on": (lambda f: [(f / f"{WEIGHTS}.aria2").touch(), sparse(f / WEIGHTS, 99)], "did not end"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_loading_and_inspecting_refuse_it_at_once_and_show_every_name(adapter, model, case, capsys):
    spoil, message = WRONG[case]
    spoil(adapter)
    for action in (lambda: load_adapter(model, adapter), lambda: inspect_adapter(adapter)):
        started = time.process_time()
        with pytest.raises(AdapterError, match=message) as error:
            action()
        assert time.process_time() - started < SECONDS
        assert "\x1b" not in str(error.value) and len(str(error.value)) < 20_000
    assert main(["inspect", str(adapter)]) == 2
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and not re.search("^error", printed, re.MULTILINE)


POINTERS = {
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "10 GB of nothing": sparse,
    "300 digits": lambda path: path.write_text("1" * 300),
    "digits of another script": lambda path: path.write_text("١"),
    "a place outside": lambda path: path.write_text("../adapter"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a loop": lambda path: path.symlink_to("latest"),
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("case", POINTERS)
def test_a_pointer_that_names_no_step_is_not_waited_for(adapter, model, tmp_path, case):
    folder = tmp_path / "adapters"
    folder.mkdir()
    POINTERS[case](folder / "latest")
    started = time.process_time()
    for action in (lambda: load_adapter(model, folder), lambda: inspect_adapter(folder)):
        with pytest.raises(AdapterError, match="is not an adapter folder: adapter_model.safetensors"):
            action()
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("pointer", [None, "9", "", "1" * 300])
def test_where_a_pointer_is_lost_the_newest_step_is_named(adapter, tmp_path, pointer):
    for step in ("2", "10"):
        shutil.copytree(adapter, tmp_path / "adapters" / step)
    (tmp_path / "adapters" / "11").mkdir()  # of no adapter
    if pointer is not None:
        (tmp_path / "adapters" / "latest").write_text(pointer)
    with pytest.raises(AdapterError, match="no `latest` names a step that is there: give .*/adapters/10, the newest"):
        inspect_adapter(tmp_path / "adapters")


def test_a_path_that_cannot_be_is_one_error(model):
    for action in (lambda path: load_adapter(model, path), inspect_adapter):
        with pytest.raises(AdapterError, match="cannot be read|not an adapter folder"):
            action("x" * 5000)


def test_inspect_names_the_base_and_obeys_no_name(adapter):
    def rename_base(config):
        config["sat_lora"]["base"]["name"] = "mine\x1b[31m\nbase"

    change_config(adapter, rename_base)
    text = describe_adapter(inspect_adapter(adapter))
    assert r"base         mine\x1b[31m\nbase (CogVLM, 333,320 parameters), " in text and "\x1b" not in text


def test_an_adapter_of_peft_and_a_run_folder_say_what_to_do(adapter, model, tmp_path):
    change_config(adapter, lambda config: config.pop("sat_lora"))
    with pytest.raises(AdapterError, match="sat-lora import --from peft"):
        load_adapter(model, adapter)
    with pytest.raises(AdapterError, match=f"missing; found: .*; give {adapter}"):
        load_adapter(model, tmp_path)


def test_a_whole_adapter_is_still_read(adapter, model):
    assert inspect_adapter(adapter)["layers"] and load_file(adapter / WEIGHTS)
