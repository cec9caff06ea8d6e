"""Folders of every family: SAT's and Hugging Face's, each made of the other, and which family a folder is of."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lora import CheckpointError, ConfigError, add_lora, save_adapter
from sat_lora.adapters.merge import merge_adapter
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name, sat_name
from sat_lora.cogvlm.checkpoints.load import check_files, load_cogvlm, read_config, save_weights, shortened
from sat_lora.cogvlm.families import FAMILIES, family_of, is_published, published, published_config
from sat_lora.cogvlm.inputs.prompts import version_of
from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.cogvlm.sizes import image_length_problem, size_problems
from sat_lora.interop.peft_export import export_to_peft
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.live_base import identity_of_model
from sat_lora.quantization.config import Quantization
from sat_lora.quantized.layers import quantized_weights
from sat_lora.quantized.quantized_weight import whole
from sat_lora.training.steps.loss import answer_loss_sum
from tests.support.sat_files import cut_by_sat
from tests.support.tiny import fill_adapters, logits_of
from tests.support.tiny_families import (
    CONFIGS,
    TOKENS,
    family_batch,
    family_model,
    published_shapes,
    write_hugging_face,
)

pytestmark = pytest.mark.usefixtures("single_process_group")
SUCCESSORS = [name for name in CONFIGS if name != "cogvlm"]
FILE = "release/mp_rank_00_model_states.pt"


def write_base(folder, name, dtype=torch.bfloat16):
    save_weights(folder, {**CONFIGS[name], **TOKENS}, family_model(name, dtype).state_dict())
    return folder


def write_empty_adapter(folder, base):
    model, _ = load_cogvlm(base)
    add_lora(model, r=1, target_modules=["lm-head"])  # B is zero: the base stays what it is
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("name", SUCCESSORS)
@torch.no_grad()
def test_sat_to_hugging_face_and_back_gives_the_same_bytes(tmp_path, name):
    base = write_base(tmp_path / "base", name)
    adapter = write_empty_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "sat")
    remarks = merge_adapter(base, adapter, tmp_path / "hf", to="hf")
    assert any(f"from a Hugging Face {FAMILIES[name].title} such as" in remark for remark in remarks)
    merge_adapter(tmp_path / "hf", adapter, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "sat" / FILE).read_bytes()
    config = read_config(tmp_path / "again")
    assert {key: config[key] for key in CONFIGS[name] if key != "eva_args"} == {
        key: value for key, value in CONFIGS[name].items() if key != "eva_args"
    }
    assert config["eos_token_id"] == [2, 9] and image_length_problem(config) is None
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["architectures"] == [FAMILIES[name].architecture]
    assert content["rope_theta"] == FAMILIES[name].rotary_base
    models = [load_cogvlm(tmp_path / kind)[0].eval() for kind in ("base", "hf")]
    assert torch.equal(*(logits_of(model, family_batch(name)) for model in models))
    identities = [BaseWeights(tmp_path / kind).identity for kind in ("base", "hf")]
    assert identities[0].difference(identities[1]) is None is identities[0].difference(identity_of_model(models[0]))
    assert identities[0].family == FAMILIES[name].title


@pytest.mark.parametrize("name", SUCCESSORS)
@torch.no_grad()
def test_merging_for_two_ranks_and_back_gives_the_same_bytes(tmp_path, name):
    """q, k and v are cut each by itself, and a second encoder not at all."""
    base = write_base(tmp_path / "base", name)
    model, _ = load_cogvlm(base)
    add_lora(model, r=2, target_modules="all-linear")
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    empty = write_empty_adapter(tmp_path / "empty", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "one")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "two", model_parallel_size=2)
    merge_adapter(tmp_path / "one", empty, tmp_path / "cut", model_parallel_size=2, any_base=True)
    merge_adapter(tmp_path / "two", empty, tmp_path / "back", any_base=True)
    one = torch.load(tmp_path / "one" / FILE)["module"]
    assert any(not torch.equal(one[key], tensor) for key, tensor in torch.load(base / FILE)["module"].items())
    expected = cut_by_sat(load_cogvlm(tmp_path / "one")[0], 2)
    for rank in range(2):
        file = f"release/mp_rank_0{rank}_model_states.pt"
        states = [torch.load(tmp_path / folder / file)["module"] for folder in ("two", "cut")]
        for state in states:
            assert state.keys() == expected[rank].keys()
            assert all(torch.equal(state[key], expected[rank][key]) for key in state)
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "one" / FILE).read_bytes()


def test_a_size_that_the_shared_heads_do_not_divide_by_is_refused(tmp_path):
    """Every tensor can be cut for four ranks; no run could use the two heads of keys."""
    base = write_base(tmp_path / "base", "cogvlm2")
    empty = write_empty_adapter(tmp_path / "empty", base)
    with pytest.raises(ConfigError, match="--model-parallel-size: 4 does not divide .*num_multi_query_heads 2"):
        merge_adapter(base, empty, tmp_path / "four", model_parallel_size=4)
    assert not (tmp_path / "four").exists()


def test_an_adapter_without_what_the_published_code_reads_alone_can_be_exported(tmp_path):
    """As docs/families.md says of CogAgent."""
    model, _ = load_cogvlm(write_base(tmp_path / "base", "cogagent"))
    add_lora(model, r=2, exclude_modules=["cross-vision-attention"])
    save_adapter(model, tmp_path / "adapter")
    export_to_peft(tmp_path / "adapter", tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", SUCCESSORS)
def test_a_step_on_nf4_is_one_on_the_decoded_weights(tmp_path, name):
    base = write_base(tmp_path / "base", name, torch.float32)
    models = [load_cogvlm(base, quantize=Quantization(scheme="nf4"))[0], load_cogvlm(base)[0]]
    held = dict(quantized_weights(models[0]))
    assert len(held) > 10 and any("cross_attention" in key for key in held) == (name == "cogagent")
    with torch.no_grad():
        for key, weight in held.items():
            models[1].get_submodule(key).weight.copy_(whole(weight))
    losses = []
    for model in models:
        add_lora(model, r=2, target_modules="all-linear")
        fill_adapters(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        losses.append([])
        for rows in ((True, False), (False, False), (True, False)):
            optimizer.zero_grad()
            loss = answer_loss_sum(model.train(), family_batch(name, rows))
            loss.backward()
            assert all(parameter.grad is not None for parameter in trained)
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][2] != losses[0][0] and losses[0] == pytest.approx(losses[1], rel=1e-5)
    ours, theirs = (adapters_of(model) for model in models)
    for key in ours:
        for leaf in ("A", "B"):
            assert torch.allclose(getattr(ours[key], leaf), getattr(theirs[key], leaf), rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize(
    ("name", "count"), [("cogvlm2-llama3-chat-19B", 1221), ("cogvlm2-video-llama3-chat", 1029), ("cogagent-chat", None)]
)
def test_every_name_of_a_published_model_has_a_counterpart(name, count):
    names = [key for key in published_shapes(name)[0] if not key.endswith("inv_freq")]
    foreign = {hf_name(key) for key in names}
    assert None not in foreign and len(foreign) == len(names)
    assert [sat_name(hf_name(key)) for key in names] == names
    assert count in (None, len(foreign) + published_config(name)["num_layers"])


@pytest.mark.parametrize(
    ("sat", "hugging_face"),
    [
        (
            "mixins.rotary.vision_query_key_value_list.7.bias",
            "model.layers.7.self_attn.vision_expert_query_key_value.bias",
        ),
        ("mixins.eva.conv.bias", "model.vision.conv.bias"),
        ("mixins.eva.pos_embed", "model.vision.pos_embed"),
        ("mixins.encoder.pos_embed", "model.cross_vision.pos_embed"),
        ("transformer.layers.3.cross_attention.key_value.weight", "model.layers.3.cross_attn.key_value.weight"),
        (
            "transformer.layers.3.post_cross_attention_layernorm.weight",
            "model.layers.3.post_cross_attention_layernorm.weight",
        ),
        ("mixins.encoder.vit.model.cls_token", "model.cross_vision.vit.model.cls_token"),
        ("mixins.encoder.vit.model.blocks.23.attn.q_bias", "model.cross_vision.vit.model.blocks.23.attn.q_bias"),
        ("mixins.encoder.vit.model.blocks.0.mlp.w3.bias", "model.cross_vision.vit.model.blocks.0.mlp.w3.bias"),
    ],
)
def test_names_are_those_of_the_table(sat, hugging_face):
    assert (hf_name(sat), sat_name(hugging_face)) == (hugging_face, sat)


@torch.no_grad()
def test_angles_that_a_file_lacks_are_computed(tmp_path):
    """They follow from the sizes, and some files of Hugging Face keep fewer copies of them, or none."""
    base = write_base(tmp_path / "base", "cogagent", torch.float32)
    adapter = write_empty_adapter(tmp_path / "adapter", base)
    merge_adapter(base, adapter, tmp_path / "hf", to="hf")
    merge_adapter(base, adapter, tmp_path / "sat")
    file = tmp_path / "hf" / "model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if ".rope.freqs_" not in key}, file)
    batch = family_batch("cogagent")
    assert torch.equal(*(logits_of(load_cogvlm(tmp_path / kind)[0].eval(), batch) for kind in ("base", "hf")))
    merge_adapter(tmp_path / "hf", adapter, tmp_path / "again")
    again, sat = (torch.load(tmp_path / kind / FILE)["module"] for kind in ("again", "sat"))
    assert again.keys() == sat.keys() and all(torch.equal(again[key], sat[key]) for key in sat)


UNGROUPED = {"num_multi_query_heads": None, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cogvlm2", {**UNGROUPED}),
        ("cogvlm2", {**UNGROUPED, "architectures": None}),
        ("cogvlm2-video", {**UNGROUPED, "architectures": None}),
        ("cogvlm2-video", {**UNGROUPED}),
        ("cogvlm2-video", {"architectures": None}),  # heads in groups are either's
        ("cogvlm2", {"architectures": None}),
        ("cogvlm2-video", {"architectures": ["CogVLMForCausalLM", "CogVLMVideoForCausalLM"]}),
        ("cogvlm", {"architectures": None}),
        ("cogagent", {"architectures": None}),
    ],
)
def test_the_family_is_known_by_the_tensors_where_the_config_does_not_say(tmp_path, name, changes):
    config = read_config(write_hugging_face(tmp_path / "hf", name, content=changes))
    assert family_of(config).name == name
    if changes.items() >= UNGROUPED.items():
        assert config["num_multi_query_heads"] == 8  # what the published config class means by saying nothing


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (
            "cogvlm",
            "cogvlm2",
            r"config.json is of a CogVLM2 \(num_multi_query_heads 2\), and the weights are those of a CogVLM; .* if "
            r"the weights are right, set architectures to \['CogVLMForCausalLM'\], and take num_multi",
        ),
        ("cogvlm2", "cogagent", r"of a CogAgent \(cross_hidden_size 32\), .* of a CogVLM2; .* set architectures "),
        ("cogvlm2", "cogvlm2-video", r"is of a CogVLM2-Video .* of a CogVLM2; .* num_multi_query_heads to 8"),
        (
            "cogvlm",
            "cogagent",
            r"CogVLM; .*, and take cross_hidden_size, cross_compute_hidden_size and cross_image_size",
        ),
        ("cogagent", "cogvlm2-video", r"of a CogAgent; .* and cross_hidden_size, cross_compute_hidden_size and cross_"),
    ],
)
def test_a_config_of_another_family_is_told_from_the_weights(tmp_path, weights, config, message):
    with pytest.raises(CheckpointError, match=message):
        read_config(write_hugging_face(tmp_path / "hf", weights, config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_class": "CogVLMModel"},
            "model_class 'CogVLMModel', which is CogVLM, and num_multi_query_heads 2, which is CogVLM2; take "
            "num_multi_query_heads out of it, or model_class to 'CogVLM2Model'",
        ),
        (
            {"num_multi_query_heads": 0},
            "which is CogVLM2, and no num_multi_query_heads, which is CogVLM; set num_multi_query_heads in it "
            r"\(8 in the published model\)",
        ),
        (
            {"model_class": "CogVLM2VideoModel"},
            r"; set num_vision_layers to 0, or model_class to 'CogVLM2Model'",  # the heads are there
        ),
        ({"num_vision_layers": 0}, "num_vision_layers 0, which is CogVLM2-Video; leave num_vision_layers out, or"),
        ({"cross_image_pix": 28}, "cross_image_pix 28, which is CogAgent; .*, and take cross_image_pix out of it, or"),
        (
            {"cross_attn_hidden_size": 3, "cross_image_pix": 28},
            "; leave num_vision_layers out, and take cross_image_pix and cross_attn_hidden_size out of it, or",
        ),
        (
            {"model_class": "CogVLMModel", "cross_attn_hidden_size": 3},
            "take num_multi_query_heads and cross_attn_hidden_size out of it, or",
        ),
        (
            {"num_vision_layers": 1},
            "num_vision_layers is 1, and CogVLM2 has visual experts in every layer; take it out",
        ),
        ({"num_multi_query_heads": 8}, "num_attention_heads 4 does not divide by num_multi_query_heads 8"),
        ({"num_multi_query_heads": 3}, "num_attention_heads 4 does not divide by num_multi_query_heads 3"),
    ],
)
def test_a_sat_config_that_is_of_two_families_says_what_to_set(changes, message):
    with pytest.raises(CheckpointError, match=message):
        build_cogvlm({**CONFIGS["cogvlm2"], **changes}, device="meta")


@pytest.mark.parametrize("model_class", [None, "FineTuneTrainCogAgentModel", "FineTuneTestCogAgentModel", "Own"])
def test_classes_of_training_and_testing_are_of_the_family(tmp_path, model_class):
    config = {**CONFIGS["cogagent"], "model_class": model_class}
    if model_class is None:
        del config["model_class"]
    assert family_of(config).name == "cogagent"


def test_weights_of_another_family_than_sats_config_are_refused(tmp_path):
    folder = tmp_path / "base"
    save_weights(folder, CONFIGS["cogvlm2-video"], family_model("cogvlm2").state_dict())
    with pytest.raises(CheckpointError, match="config is of a CogVLM2-Video, and its weights are those of a CogVLM2; "):
        check_files(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_args": {"blocks": 3}}, "encoder_args has no 'blocks'"),
        ({"encoder_args": []}, "encoder_args is .*, wanted an object"),
        ({"encoder_args": {"num_layers": 0}}, "encoder_args.num_layers is 0, wanted a whole number from 1"),
        ({"cross_image_pix": 3}, "cross_image_pix is 3, less than a patch of 7"),
        ({"is_decoder": [True]}, "is_decoder has 1 entries, wanted one for each of 2 layers"),
        ({"is_decoder": False}, "is_decoder is False, wanted true"),
        ({"cross_attn_hidden_size": 16}, "cross_attn_hidden_size is 16, and the encoder's hidden_size 32"),
        (
            {"num_multi_query_heads": 2},
            "num_multi_query_heads is 2, and CogAgent has a key for each of 4 heads; take it",
        ),
        ({"num_vision_layers": 0}, "num_vision_layers is 0, and CogAgent has visual experts in every layer"),
    ],
)
def test_sizes_of_a_second_encoder_that_cannot_be_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        build_cogvlm({**CONFIGS["cogagent"], **changes}, device="meta")


@pytest.mark.parametrize(
    ("weights", "changes", "advice"),
    [
        ("cogvlm", {"cross_image_size": 0}, r"\], and take cross_image_size out$"),
        ("cogvlm", {"num_multi_query_heads": 2, "architectures": None}, r"\], and take num_multi_query_heads out$"),
        ("cogvlm2", {"cross_hidden_size": 8, "cross_image_size": 9}, "8, and take cross_hidden_size and cross_im"),
        ("cogagent", {"cross_hidden_size": None, "cross_image_size": None, "architectures": ["CogVLMVideoForCausalLM"],
         "num_multi_query_heads": 2}, "and cross_image_size, and take num_multi_query_heads out$"),
    ],
)  # fmt: skip
def test_advice_on_a_config_takes_out_what_is_in_it(tmp_path, weights, changes, advice):
    with pytest.raises(CheckpointError, match=advice):
        read_config(write_hugging_face(tmp_path / "hf", weights, content=changes))


@pytest.mark.parametrize("heads", [3, 5, 8])
@pytest.mark.parametrize("name", ["cogvlm2", "cogvlm2-video"])
def test_heads_that_share_no_keys_evenly_are_told_when_the_config_is_read(tmp_path, name, heads):
    with pytest.raises(CheckpointError, match=f"heads 4 does not divide by num_multi_query_heads {heads}"):
        read_config(write_hugging_face(tmp_path / "hf", name, content={"num_multi_query_heads": heads}))


def test_visual_experts_in_all_layers_may_be_said():
    config = {**CONFIGS["cogvlm2"], "num_vision_layers": CONFIGS["cogvlm2"]["num_layers"]}
    assert size_problems(config) == [] == size_problems(shortened(config, 1))
    assert shortened(config, 1)["num_vision_layers"] == 1 and "num_vision_layers" not in shortened(CONFIGS["cogvlm"], 1)
    video = CONFIGS["cogvlm2-video"]
    assert size_problems(shortened(video, 1)) == [] and shortened(video, 1)["num_vision_layers"] == 0


def test_published_configs_are_whole_and_of_their_family():
    for name in published():
        config = published_config(name)
        assert image_length_problem(config) is None
        assert any(name.startswith(family) for family in (family_of(config).name, "cogagent"))


@pytest.mark.parametrize(
    ("name", "template", "version"),
    [("cogvlm2", "chat", "chat_old"), ("cogagent", "chat", "chat"), ("cogagent", "chat_old", "chat_old"),
     ("cogvlm2-video", "base", "base"), ("cogvlm2", None, "chat_old"), ("cogagent", None, "chat")],
)  # fmt: skip
def test_a_template_of_hugging_face_means_the_prompts_of_its_family(tmp_path, name, template, version):
    folder = write_hugging_face(tmp_path / "hf", name, content={"template_version": template})
    assert version_of(folder) == version


def test_sizes_that_are_missing_are_named_with_what_the_published_model_has():
    config = {
        name: value for name, value in CONFIGS["cogagent"].items() if name not in ("is_decoder", "cross_image_pix")
    }
    with pytest.raises(
        CheckpointError, match=r"lacks cross_image_pix \(1120\), is_decoder \(32 times true\); it is no Cog"
    ):
        build_cogvlm(config, device="meta")
    for name in ("cogagent-vqa", "cogagent-chat-hf"):
        assert is_published(name) and published_config(name) == published_config("cogagent-chat")
