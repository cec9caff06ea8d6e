"""The name map covers every parameter of the model, both ways, and is the one of the published checkpoints."""

import pytest

from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name, sat_name
from tests.support.tiny import tiny_model


def test_every_parameter_has_a_name_of_its_own_and_comes_back(single_process_group):
    names = [name for name in tiny_model().state_dict() if name != "mixins.rotary.rotary_emb.inv_freq"]
    translated = [hf_name(name) for name in names]
    assert None not in translated and len(set(translated)) == len(names)
    assert [sat_name(name) for name in translated] == names


@pytest.mark.parametrize(
    "sat, hf",
    [
        (
            "transformer.layers.31.attention.query_key_value.weight",
            "model.layers.31.self_attn.language_expert_query_key_value.weight",
        ),
        ("mixins.mlp.vision_gate_proj.7.weight", "model.layers.7.mlp.vision_mlp.gate_proj.weight"),
        (
            "mixins.eva.vit_model.transformer.layers.62.mlp.dense_h_to_4h.bias",
            "model.vision.transformer.layers.62.mlp.fc1.bias",
        ),
        ("mixins.eva.vit_model.transformer.word_embeddings.weight", "model.vision.patch_embedding.cls_embedding"),
        ("mixins.eva.linear_proj.norm1.bias", "model.vision.linear_proj.norm1.bias"),
        ("mixins.lm.lm_head", "lm_head"),
    ],
)
def test_published_names(sat, hf):
    assert hf_name(sat) == hf
    assert sat_name(hf) == sat


def test_names_of_neither_are_none():
    assert hf_name("mixins.rotary.rotary_emb.inv_freq") is None
    assert hf_name("model.norm.weight") is None
    assert sat_name("model.layers.0.self_attn.q_proj.weight") is None
