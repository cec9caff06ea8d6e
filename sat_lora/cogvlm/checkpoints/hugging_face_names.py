"""Names of the parameters of CogVLM and its successors in their Hugging Face versions, and back.

No name means different things in two families, so there is one table for all. The weights themselves are the same: q,
k, v lie in block order in both, and both rotate half against half. Only SAT's buffer
`mixins.rotary.rotary_emb.inv_freq` is one where Hugging Face's layers have a copy each.
"""

import re

_LAYER = "transformer.layers.{i}"
_HF_LAYER = "model.layers.{i}"
_VIT = "mixins.eva.vit_model"
_HF_VIT = "model.vision"
_ENCODER = "mixins.encoder"
_HF_ENCODER = "model.cross_vision"
_BLOCK = ".vit.model.blocks.{i}."
_LEAVES_OF_BLOCK = (
    *("norm1", "norm2", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.q_bias", "attn.v_bias"),
    *("attn.inner_attn_ln", "attn.proj", "attn.rope.freqs_cos", "attn.rope.freqs_sin"),
    *("mlp.w1", "mlp.w2", "mlp.w3", "mlp.ffn_ln"),
)
_LEAVES = ("cls_token", "pos_embed", "patch_embed.proj", "norm", "head", "rope.freqs_cos", "rope.freqs_sin")
_NAMES = {
    f"{_LAYER}.attention.query_key_value": f"{_HF_LAYER}.self_attn.language_expert_query_key_value",
    f"{_LAYER}.attention.dense": f"{_HF_LAYER}.self_attn.language_expert_dense",
    "mixins.rotary.vision_query_key_value_list.{i}": f"{_HF_LAYER}.self_attn.vision_expert_query_key_value",
    "mixins.rotary.vision_dense_list.{i}": f"{_HF_LAYER}.self_attn.vision_expert_dense",
    "mixins.mlp.gate_proj.{i}": f"{_HF_LAYER}.mlp.language_mlp.gate_proj",
    f"{_LAYER}.mlp.dense_h_to_4h": f"{_HF_LAYER}.mlp.language_mlp.up_proj",
    f"{_LAYER}.mlp.dense_4h_to_h": f"{_HF_LAYER}.mlp.language_mlp.down_proj",
    "mixins.mlp.vision_gate_proj.{i}": f"{_HF_LAYER}.mlp.vision_mlp.gate_proj",
    "mixins.mlp.vision_dense_h_to_4h_list.{i}": f"{_HF_LAYER}.mlp.vision_mlp.up_proj",
    "mixins.mlp.vision_dense_4h_to_h_list.{i}": f"{_HF_LAYER}.mlp.vision_mlp.down_proj",
    f"{_LAYER}.input_layernorm": f"{_HF_LAYER}.input_layernorm",
    f"{_LAYER}.post_attention_layernorm": f"{_HF_LAYER}.post_attention_layernorm",
    "transformer.word_embeddings": "model.embed_tokens",
    "transformer.final_layernorm": "model.norm",
    "mixins.lm.lm_head": "lm_head",
    f"{_VIT}.{_LAYER}.attention.query_key_value": f"{_HF_VIT}.{_LAYER}.attention.query_key_value",
    f"{_VIT}.{_LAYER}.attention.dense": f"{_HF_VIT}.{_LAYER}.attention.dense",
    f"{_VIT}.{_LAYER}.mlp.dense_h_to_4h": f"{_HF_VIT}.{_LAYER}.mlp.fc1",
    f"{_VIT}.{_LAYER}.mlp.dense_4h_to_h": f"{_HF_VIT}.{_LAYER}.mlp.fc2",
    f"{_VIT}.{_LAYER}.input_layernorm": f"{_HF_VIT}.{_LAYER}.input_layernorm",
    f"{_VIT}.{_LAYER}.post_attention_layernorm": f"{_HF_VIT}.{_LAYER}.post_attention_layernorm",
    f"{_VIT}.mixins.patch_embedding.proj": f"{_HF_VIT}.patch_embedding.proj",
    f"{_VIT}.transformer.word_embeddings.weight": f"{_HF_VIT}.patch_embedding.cls_embedding",
    f"{_VIT}.transformer.position_embeddings": f"{_HF_VIT}.patch_embedding.position_embedding",
    **{f"mixins.eva.{leaf}": f"{_HF_VIT}.{leaf}" for leaf in ("boi", "eoi")},
    **{
        f"mixins.eva.linear_proj.{leaf}": f"{_HF_VIT}.linear_proj.{leaf}"
        for leaf in ("linear_proj", "norm1", "gate_proj", "dense_h_to_4h", "dense_4h_to_h")
    },
    "mixins.eva.conv": f"{_HF_VIT}.conv",
    "mixins.eva.pos_embed": f"{_HF_VIT}.pos_embed",
    **{
        f"{_LAYER}.cross_attention.{leaf}": f"{_HF_LAYER}.cross_attn.{leaf}" for leaf in ("query", "key_value", "dense")
    },
    f"{_LAYER}.post_cross_attention_layernorm": f"{_HF_LAYER}.post_cross_attention_layernorm",
    f"{_ENCODER}.pos_embed": f"{_HF_ENCODER}.pos_embed",
    **{f"{_ENCODER}{_BLOCK}{leaf}": f"{_HF_ENCODER}{_BLOCK}{leaf}" for leaf in _LEAVES_OF_BLOCK},
    **{f"{_ENCODER}.vit.model.{leaf}": f"{_HF_ENCODER}.vit.model.{leaf}" for leaf in _LEAVES},
}


def _table(names: dict[str, str]) -> list[tuple[re.Pattern, str]]:
    """Return (pattern, replacement) for a module's name or that of one of its parameters."""
    return [
        (re.compile(re.escape(old).replace(r"\{i\}", r"(\d+)") + r"(\.weight|\.bias)?"), new.replace("{i}", r"\1"))
        for old, new in names.items()
    ]


_TO_HF = _table(_NAMES)
_TO_SAT = _table({hf: sat for sat, hf in _NAMES.items()})


def _translate(name: str, table: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, replacement in table:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement) + (match[match.re.groups] or "")
    return None


def hf_name(name: str) -> str | None:
    """Return the Hugging Face name of a SAT module or parameter of these models; None where there is none."""
    return _translate(name, _TO_HF)


def sat_name(name: str) -> str | None:
    """Return the SAT name of a Hugging Face module or parameter of these models; None where there is none."""
    return _translate(name, _TO_SAT)
