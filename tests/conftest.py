"""Fixtures that several tests share; everything is made by code, nothing is fetched."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.character_tokenizer import write_character_tokenizer
from tests.support.paths import DEMO
from tests.support.patience import PATIENCE, patient
from tests.support.picture_files import write_images

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch is imported. Tiny matrices gain nothing from threads, and on busy cores lose a factor of ten to them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under nohup: this process goes on as before, and those that tests start do not inherit that it is ignored.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_collection_modifyitems(config, items) -> None:
    """Each test's own time limit, or the one of all, as long as this machine needs."""
    if PATIENCE == 1:
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit = marker.args[0] if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patient(limit)), append=False)


SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "inner_hidden_size": 32,
    "vocab_size": 128,
    "layernorm_order": "pre",
    "max_sequence_length": 64,
    "image_length": 9,
    "eva_args": {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "inner_hidden_size": 32,
        "vocab_size": 1,
        "layernorm_order": "post",
        "image_size": [21, 21],
        "patch_size": 7,
        "pre_len": 1,
        "post_len": 0,
        "in_channels": 3,
    },
}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """What looks like a SAT model folder with a tokenizer; its weight file holds no tensors."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "1").mkdir()
    (folder / "latest").write_text("1\n")
    import torch

    torch.save({"module": {}}, folder / "1" / "mp_rank_00_model_states.pt")
    (folder / "model_config.json").write_text(json.dumps(SIZES))
    write_character_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder):
    from sat_lora.cogvlm.inputs.text import load_tokenizer

    return load_tokenizer(base_folder)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    return write_images(tmp_path / "images", [f"{number:03}.png" for number in range(6)])


@pytest.fixture(scope="session")
def single_process_group():
    """A process group of one, with SAT's model-parallel groups in it. What it puts into the environment is taken out
    again: processes that tests start would take themselves for ranks of this group.
    """
    from sat_lora.parallel.distributed import init_distributed, init_model_parallel

    before = dict(os.environ)
    try:
        return init_model_parallel(init_distributed())
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@pytest.fixture(scope="session")
def captchas(tmp_path_factory) -> Path:
    """A few captchas of the demo's kind, in train/, valid/ and test/."""
    sys.path.insert(0, str(DEMO))
    try:
        from make_captchas import make_captchas
    finally:
        sys.path.remove(str(DEMO))
    folder = tmp_path_factory.mktemp("data") / "captchas"
    make_captchas(folder, train=64, valid=16, test=12, seed=3, workers=2)
    return folder
