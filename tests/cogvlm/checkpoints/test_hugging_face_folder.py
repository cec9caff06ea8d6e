"""CogVLM in Hugging Face's files: the same model, and folders that are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.model_folders import write_hugging_face
from sat_lora import CheckpointError
from sat_lora.cogvlm.checkpoints.load import check_files, load_cogvlm, read_config, save_weights, weight_files
from tests.support.tiny import CONFIG, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
LAST = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def state(single_process_group):
    return tiny_model().state_dict()


@pytest.fixture
def folder(tmp_path, state):
    write_hugging_face(tmp_path / "hf", CONFIG, state, shards=3)
    return tmp_path / "hf"


@pytest.mark.parametrize("shards", [1, 3])
def test_the_logits_are_those_of_the_sat_folder(tmp_path, state, shards):
    write_hugging_face(tmp_path / "hf", CONFIG, state, shards)
    save_weights(tmp_path / "sat", CONFIG, state)
    model, sat = load_cogvlm(tmp_path / "hf")[0].eval(), load_cogvlm(tmp_path / "sat")[0].eval()
    assert len(weight_files(tmp_path / "hf")) == shards
    assert torch.equal(logits_of(model, tiny_batch()), logits_of(sat, tiny_batch()))
    assert all(torch.equal(tensor, sat.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_sizes_are_those_of_model_config_json(folder):
    config = read_config(folder)
    tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    for name, size in {**CONFIG, **tokens}.items():
        if name != "eva_args":
            assert config[name] == size, name
    for name, size in CONFIG["eva_args"].items():
        assert config["eva_args"][name] == size, name
    assert config["layernorm_epsilon"] == 1e-5
    assert config["hidden_dropout"] == config["eva_args"]["hidden_dropout"] == 0


def test_frequencies_in_the_files_are_ignored(folder, state):
    file = weight_files(folder)[0]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file({**load_file(file), **frequencies}, file)
    name = "mixins.rotary.rotary_emb.inv_freq"
    assert torch.equal(load_cogvlm(folder)[0].state_dict()[name], state[name])


def rewrite_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def spoil(folder, how):
    last = folder / LAST
    if how == "missing shard":
        last.unlink()
    elif how == "truncated shard":
        last.write_bytes(last.read_bytes()[:-1000])
    elif how == "empty shard":
        last.write_bytes(b"")
    elif how == "shard without a tensor":
        tensors = load_file(last)
        del tensors["model.norm.weight"]
        save_file(tensors, last)
    elif how == "index of SAT files":
        rewrite_index(folder, lambda places: places.update({"lm_head.weight": "mp_rank_00_model_states.pt"}))
    elif how == "no index":
        (folder / INDEX).write_text("[1]")
    elif how == "SAT files too":
        (folder / "latest").write_text("release")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "other config":
        (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "hidden_act": "relu"}))
    elif how == "other patches":
        content = json.loads((folder / "config.json").read_text())
        content["vision_config"]["num_positions"] = 11
        (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing shard", f"index.json names {LAST}, not there; download again; found: config"),
        ("truncated shard", f"{LAST}: cannot be read as safetensors: .*not fully covered"),
        ("empty shard", f"{LAST}: cannot be read as safetensors"),
        ("shard without a tensor", rf"{LAST} lacks model.norm.weight, which .*index.json says"),
        ("index of SAT files", "index.json names mp_rank_00_model_states.pt; only .safetensors files belong there"),
        ("no index", "index.json: expected a JSON object, got list"),
        ("SAT files too", r"holds a SAT model \(latest\) and a Hugging Face model \(model.safetensors.index.json\)"),
    ],
)
def test_files_that_are_wrong_are_named_before_a_model_is_built(folder, how, message):
    spoil(folder, how)
    with pytest.raises(CheckpointError, match=message):
        check_files(folder)
    with pytest.raises(CheckpointError, match=message):
        load_cogvlm(folder)


@pytest.mark.parametrize(
    "how, message",
    [
        ("no config", "config.json: cannot be read as JSON"),
        ("other config", "not the config of a CogVLM: no num_hidden_layers.*no vision_config.*'relu' where CogVLM has"),
        ("other patches", "num_positions is 11; an image of 21 pixels in patches of 7 has 9, and one for the class"),
    ],
)
def test_a_config_that_is_wrong_is_named(folder, how, message):
    spoil(folder, how)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


def test_tensors_that_do_not_fit_are_named_as_in_the_files(folder, tmp_path, state):
    other = {name: tensor for name, tensor in state.items() if name != "mixins.eva.boi"}
    other["mixins.lm.lm_head.weight"] = torch.zeros(5, 7)
    write_hugging_face(tmp_path / "other", CONFIG, other)
    with pytest.raises(CheckpointError, match="2 problems") as error:
        load_cogvlm(tmp_path / "other")
    assert "missing mixins.eva.boi (model.vision.boi in the file)" in str(error.value)
    assert "lm_head.weight: shape (5, 7), the model has (1024, 64) (lm_head.weight in the file)" in str(error.value)
