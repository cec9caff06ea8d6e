"""Fixtures of conversations: a base of random weights that talks, two adapters of it, and a picture."""

import shutil

import numpy
import pytest
from PIL import Image

from sat_lora import LoraConfig, add_lora, save_adapter
from sat_lora.cogvlm import build_cogvlm, load_cogvlm
from sat_lora.cogvlm.checkpoints.load import read_config, save_weights
from tests.support.paths import TINY_BASE
from tests.support.tiny import fill_adapters, randomise


@pytest.fixture(scope="session")
def base(single_process_group, tmp_path_factory):
    """A folder with the sizes and the tokenizer of the demo's base, whose weights are random: it seldom ends."""
    folder = tmp_path_factory.mktemp("base") / "talker"
    folder.mkdir()
    config = read_config(TINY_BASE)
    model = build_cogvlm(config)
    randomise(model, seed=3)
    save_weights(folder, config, model.state_dict())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_BASE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory):
    """The folders of two adapters by name."""
    folders = {name: tmp_path_factory.mktemp("adapters") / name / "adapter" for name in ("mine", "other")}
    for seed, folder in enumerate(folders.values()):
        model, _ = load_cogvlm(base)
        add_lora(model, LoraConfig(r=4))
        fill_adapters(model, seed=seed)
        save_adapter(model, folder)
    return folders


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """The path of a picture, with a space in it."""
    path = tmp_path_factory.mktemp("pictures") / "a cat.png"
    noise = numpy.random.default_rng(0).integers(0, 256, (42, 60, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(path)
    return path
