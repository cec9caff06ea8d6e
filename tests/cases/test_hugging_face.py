"""Hugging Face in and out is whole: what `from_pretrained` needs is written, what its code cannot run is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lora import CheckpointError, add_lora, save_adapter
from sat_lora.adapters.merge import merge_adapter
from sat_lora.cogvlm.checkpoints.hugging_face_writer import hugging_face_config, make_hugging_face_weights
from sat_lora.cogvlm.checkpoints.load import check_files, load_cogvlm, read_config, save_weights, weight_files
from sat_lora.cogvlm.network.model import build_cogvlm
from tests.support.character_tokenizer import write_character_tokenizer
from tests.support.hf_code.configuration_cogvlm import CogVLMConfig
from tests.support.hf_code.modeling_cogvlm import CogVLMForCausalLM
from tests.support.paths import ROOT
from tests.support.tiny import CONFIG, fill_adapters, logits_of, randomise, tiny_batch

pytestmark = pytest.mark.usefixtures("single_process_group")
CODE = ROOT / "tests" / "support" / "hf_code"
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = {**CONFIG, **TOKENS, "layernorm_epsilon": 1e-5, "text_processor_version": "vqa"}


def write_base(folder, config=SIZES, dtype=torch.float32) -> Path:
    model = build_cogvlm(config, dtype=dtype)
    randomise(model, 0)
    save_weights(folder, config, model.state_dict())
    return folder


def write_adapter(folder, base) -> Path:
    model, _ = load_cogvlm(base)
    add_lora(model, r=2, target_modules=["language-mlp", "vit-attention"])
    fill_adapters(model)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def merged(tmp_path):
    """Merges an adapter into a base of that config and gives (base, adapter, merged folder, remarks)."""

    def merge(config=SIZES, dtype=torch.float32, **how):
        base = write_base(tmp_path / "base", config, dtype)
        adapter = write_adapter(tmp_path / "adapter", base)
        remarks = merge_adapter(base, adapter, tmp_path / "out", **{"to": "hf", **how})
        return base, adapter, tmp_path / "out", remarks

    return merge


def files_of(folder) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def foreign_logits(model, batch) -> torch.Tensor:
    return model(batch["input_ids"], batch["image_embed_mask"], batch["images"])


@pytest.mark.parametrize(
    "changes",
    [{}, {"layernorm_epsilon": 0.1}, {"num_layers": 3, "inner_hidden_size": 40}],
    ids=["published epsilon", "another epsilon", "other sizes"],
)
@torch.no_grad()
def test_an_independent_model_built_from_the_config_takes_the_files_whole(merged, tmp_path, changes):
    base, adapter, out, _ = merged({**SIZES, **changes})
    foreign = CogVLMForCausalLM(CogVLMConfig(**json.loads((out / "config.json").read_text()))).eval()
    for buffer in foreign.buffers():
        buffer.fill_(torch.nan)  # they come from the files, or show
    foreign.load_state_dict(files_of(out), strict=True)
    merge_adapter(base, adapter, tmp_path / "sat")
    expected = logits_of(load_cogvlm(tmp_path / "sat")[0].eval(), tiny_batch())
    found = foreign_logits(foreign, tiny_batch())
    assert (found - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_from_pretrained_opens_a_folder_made_from_a_base_with_its_code(merged, tmp_path, monkeypatch):
    """The code beside a Hugging Face base comes along, so that nothing has to be put there by hand."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    from transformers import AutoModelForCausalLM, GenerationConfig

    _, adapter, hf_base, _ = merged()
    for name in ("configuration_cogvlm.py", "modeling_cogvlm.py"):
        shutil.copy(CODE / name, hf_base)
    own = {**json.loads((hf_base / "config.json").read_text()), "mine": "kept", "dtype": "float32"}
    (hf_base / "config.json").write_text(json.dumps(own))
    write_character_tokenizer(hf_base)
    again = tmp_path / "again"
    assert merge_adapter(hf_base, adapter, again, to="hf", dtype=torch.bfloat16, any_base=True) == []
    written = json.loads((again / "config.json").read_text())
    assert (written["mine"], written["dtype"], written["torch_dtype"]) == ("kept", "bfloat16", "bfloat16")
    model, told = AutoModelForCausalLM.from_pretrained(
        again, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    expected = logits_of(load_cogvlm(again)[0].eval(), tiny_batch())
    assert (foreign_logits(model.eval(), tiny_batch()) - expected).norm() < 1e-5 * expected.norm()
    assert GenerationConfig.from_pretrained(again).eos_token_id == 2


def test_what_the_folder_holds_and_what_it_still_wants_is_said(merged):
    base, _, out, remarks = merged()
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "cogvlm" and config["architectures"] == ["CogVLMForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_cogvlm.CogVLMForCausalLM"
    assert (config["rope_theta"], config["template_version"], config["torch_dtype"]) == (10000, "vqa", "float32")
    generation = json.loads((out / "generation_config.json").read_text())
    assert {name: generation[name] for name in TOKENS} == TOKENS
    code, tokenizer = remarks
    assert "configuration_cogvlm.py, modeling_cogvlm.py, visual.py, util.py beside it" in code
    assert f"no tokenizer lies in {base}" in tokenizer


@pytest.mark.parametrize(
    ("version", "template"), [("base", "base"), ("vqa", "vqa"), ("chat_old", "chat"), ("chat", "base"), (None, None)]
)
def test_the_template_is_the_one_that_makes_the_prompts_of_the_base(version, template):
    """As both write them: `Question: q Answer:` is `chat_old` in SAT and `chat` in the published code."""
    written = hugging_face_config({**SIZES, "text_processor_version": version})
    assert written.get("template_version") == template


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_base": 100.0}, "rotary base 100 where the code has 10000"),
        ({"rotary_base": 500000}, "rotary base 500000 where the code has 10000"),
        ({"use_bias": True}, "use_bias True where the code has False"),
        ({"use_final_layernorm": False}, "use_final_layernorm False where the code has True"),
        ({"use_qkv_bias": True}, "use_qkv_bias True where the code has False"),
        ({"eva_args": {**CONFIG["eva_args"], "use_bias": False}}, "eva_args.use_bias False where the code has True"),
        ({"eva_args": {**CONFIG["eva_args"], "image_size": [21, 14]}}, "images of 21 x 14"),
        ({"hidden_size_per_attention_head": 8}, "hidden_size_per_attention_head 8"),
        ({"eva_args": {**CONFIG["eva_args"], "layernorm_order": "pre"}}, "eva_args.layernorm_order 'pre'"),
    ],
)
def test_what_the_code_cannot_run_is_refused_and_not_written(tmp_path, changes, message):
    frequencies = 10000.0 ** -(torch.arange(8) / 8)
    with pytest.raises(CheckpointError, match=message):
        make_hugging_face_weights(tmp_path, {**SIZES, **changes}, {}, frequencies)
    assert not list(tmp_path.iterdir())


def test_a_base_with_other_frequencies_in_its_files_is_no_hugging_face_model(tmp_path):
    base = write_base(tmp_path / "base")
    file = base / "release" / "mp_rank_00_model_states.pt"
    state = torch.load(file)
    state["module"]["mixins.rotary.rotary_emb.inv_freq"] *= 1.01
    torch.save(state, file)
    adapter = write_adapter(tmp_path / "adapter", base)
    with pytest.raises(CheckpointError, match="rotary frequencies of another base where the code has 10000"):
        merge_adapter(base, adapter, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_frequencies_that_bfloat16_rounded_stay_what_they_are(merged, tmp_path):
    base, adapter, out, _ = merged(dtype=torch.bfloat16)
    merge_adapter(base, adapter, tmp_path / "sat")
    models = [load_cogvlm(folder)[0].eval() for folder in (out, tmp_path / "sat")]
    assert torch.equal(*(logits_of(model, tiny_batch()) for model in models))


def change(name, value):
    def changed(content):
        section = content["vision_config"] if name.startswith("vision_config.") else content
        leaf = name.removeprefix("vision_config.")
        section[leaf] = value
        if value is None:
            del section[leaf]

    return changed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("rms_norm_eps", None), "no rms_norm_eps"),
        (change("vision_config.patch_size", None), "no vision_config.patch_size"),
        (change("rope_theta", 500000.0), "rope_theta is 500000.0, and CogVLM's code has 10000"),
        (change("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}), "rope_theta is 500000.0"),
        (change("rope_scaling", {"type": "linear", "factor": 2}), "rope_scaling is {'type'"),
        (change("tie_word_embeddings", True), "tie_word_embeddings is true, and CogVLM's head has weights of its own"),
        (change("quantization_config", {"load_in_4bit": True}), "its weights are quantised"),
    ],
)
def test_a_config_of_something_else_is_refused_by_name(tmp_path, spoil, message):
    content = hugging_face_config(SIZES)
    spoil(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def write_index(folder, *names) -> None:
    places = {f"tensor {number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("outside", ["../{}", "/etc/{}", "sub/{}", "./../x/{}"])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, outside):
    file = "model-00001-of-00003.safetensors"
    (tmp_path / file).touch()
    write_index(tmp_path, file, outside.format(file))
    with pytest.raises(CheckpointError, match="its files have to lie beside it"):
        weight_files(tmp_path)


def test_lost_files_are_counted(tmp_path):
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    write_index(tmp_path, *names)
    for name in names[::2]:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="2 of 3 files are there: .* names model-00002-of-00003.safetensors, not"):
        weight_files(tmp_path)


def test_frequencies_of_another_base_in_the_files_are_refused(tmp_path):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file({name: 500000.0 ** -(torch.arange(8) / 8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} has other rotary frequencies"):
        check_files(tmp_path)


def test_merging_follows_no_link_out_of_the_base(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    (tmp_path / "secret").write_text("mine alone")
    (base / "tokenizer.model").write_text("inside")
    (base / "same.txt").symlink_to("tokenizer.model")
    (base / "below.txt").symlink_to("release/notes.txt")
    (base / "release" / "notes.txt").write_text("below")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    (base / "up.txt").symlink_to("../secret")
    (base / "twice.txt").symlink_to("notes.txt")
    (base / "gone.txt").symlink_to("nowhere")
    (base / "loop.txt").symlink_to("loop.txt")
    (base / "system").symlink_to("/etc/passwd")
    os.mkfifo(base / "pipe.txt")
    (remark,) = merge_adapter(base, adapter, tmp_path / "out")
    assert "gone.txt, loop.txt, notes.txt, system, twice.txt, up.txt" in remark
    copied = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert copied.keys() == {"latest", "model_config.json", "release", "same.txt", "tokenizer.model", "below.txt"}
    assert not any(path.is_symlink() for path in copied.values()) and copied["same.txt"].read_text() == "inside"


def test_the_cache_of_hugging_face_is_one_folder(tmp_path):
    """There the files of a model are links into a folder of blobs beside the snapshots."""
    base = write_base(tmp_path / "models--me--mine" / "snapshots" / "abc")
    blobs = tmp_path / "models--me--mine" / "blobs"
    blobs.mkdir()
    (blobs / "123").write_text("a tokenizer")
    (base / "tokenizer.json").symlink_to("../../blobs/123")
    assert merge_adapter(base, write_adapter(tmp_path / "adapter", base), tmp_path / "out") == []
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "a tokenizer"
