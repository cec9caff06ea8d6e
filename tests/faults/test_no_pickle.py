"""Pickles that would run something: never from an adapter, from a base checkpoint only with --trust-checkpoint."""

import os
import pickle
import shutil

import pytest
import torch

from sat_lora import AdapterError, CheckpointError, load_adapter
from sat_lora.adapters.merge import merge_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights
from tests.support.adapter_folders import CONFIG, WEIGHTS, assert_refused
from tests.support.configs import parse_options
from tests.support.tiny import CONFIG as SIZES
from tests.support.tiny import tiny_model

RANK_FILE = "release/mp_rank_00_model_states.pt"


class Bomb:
    """Unpickled, it makes the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


@pytest.fixture
def crater(tmp_path):
    return tmp_path / "went off"


def as_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def as_torch_file(path, content):
    torch.save(content, path)


@pytest.mark.parametrize("write", [as_pickle, as_torch_file])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_pickle_in_an_adapter_is_refused_and_not_run(tmp_path, pristine, fresh, crater, write, name):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    write(adapter / name, Bomb(crater))
    assert_refused(fresh, adapter, f"{name}: ")
    assert not crater.exists()


@pytest.mark.parametrize("write", [as_pickle, as_torch_file])
def test_pickles_that_peft_and_torch_would_open_are_not_looked_at(tmp_path, pristine, crater, write):
    adapter = shutil.copytree(pristine, tmp_path / "adapter")
    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
        write(adapter / name, Bomb(crater))
    load_adapter(tiny_model(), adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(
        AdapterError, match=f"{WEIGHTS} missing; found: README.md, adapter_config.json, adapter_model.bin"
    ):
        read_adapter(adapter)
    assert not crater.exists()


@pytest.fixture
def trapped_base(tmp_path, fresh, crater):
    """A base whose weights are sound, with a bomb beside them."""
    folder = tmp_path / "base"
    save_weights(folder, SIZES, fresh.state_dict())
    torch.save({"module": fresh.state_dict(), "args": Bomb(crater)}, folder / RANK_FILE)
    return folder


USES = {
    "load": lambda base, adapter, out, **trust: load_cogvlm(base, **trust),
    "merge": lambda base, adapter, out, **trust: merge_adapter(base, adapter, out, **trust),
}


@pytest.mark.parametrize("use", USES)
def test_a_base_is_unpickled_only_by_those_who_trust_it(tmp_path, pristine, trapped_base, crater, use):
    with pytest.raises(CheckpointError) as error:
        USES[use](trapped_base, pristine, tmp_path / "out")
    for words in (RANK_FILE, "os.makedirs", "--trust-checkpoint", "runs any code that is in it", "nothing was run"):
        assert words in str(error.value)
    assert not crater.exists()
    USES[use](trapped_base, pristine, tmp_path / "out", trust=True)
    assert crater.exists()


def test_the_merge_command_takes_the_option_that_its_error_names(tmp_path, pristine, trapped_base, crater, capsys):
    arguments = ["merge", "--base", str(trapped_base), "--adapter", str(pristine), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2 and not crater.exists()
    assert "--trust-checkpoint" in capsys.readouterr().err
    assert main([*arguments, "--trust-checkpoint"]) == 0 and crater.exists()


def test_a_trusted_base_has_the_weights_of_its_file(trapped_base, fresh):
    loaded, _ = load_cogvlm(trapped_base, trust=True)
    expected = torch.load(trapped_base / RANK_FILE, weights_only=False)["module"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_trusted_file_that_is_damaged_is_still_a_checkpoint_error(trapped_base):
    path = trapped_base / RANK_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=RANK_FILE):
        load_cogvlm(trapped_base, trust=True)


def test_trust_is_an_option_and_never_the_default():
    assert parse_options([]).start.trust_checkpoint is False
    assert parse_options(["--trust-checkpoint"]).start.trust_checkpoint is True
