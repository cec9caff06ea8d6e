"""The parameters of the published successors of CogVLM: names in SAT and in Hugging Face, whole shapes, cuts.

Written down from the published files and code, and from nothing of this package. {i}: a layer of the language model,
{j}: of the first vision transformer, {b}: a block of CogAgent's second one; `_SHORT` has what capitals stand for. The
third column is the dimension that model parallelism cuts, with the blocks that are cut each by itself: col and row are
the rows of a column-parallel linear and of an embedding, in the columns of a row-parallel linear.
"""

import re

_ALL = """
transformer.word_embeddings.weight       | VOCAB 4096    | row       | model.embed_tokens.weight
transformer.final_layernorm.weight       | 4096          | -         | model.norm.weight
mixins.lm.lm_head.weight                 | VOCAB 4096    | col       | lm_head.weight
L.input_layernorm.weight                 | 4096          | -         | M.input_layernorm.weight
L.post_attention_layernorm.weight        | 4096          | -         | M.post_attention_layernorm.weight
L.attention.query_key_value.weight | QKV 4096 | QKVS | M.self_attn.language_expert_query_key_value.weight
L.attention.dense.weight                 | 4096 4096     | in        | M.self_attn.language_expert_dense.weight
mixins.mlp.gate_proj.{i}.weight          | INNER 4096    | col       | M.mlp.language_mlp.gate_proj.weight
L.mlp.dense_h_to_4h.weight               | INNER 4096    | col       | M.mlp.language_mlp.up_proj.weight
L.mlp.dense_4h_to_h.weight               | 4096 INNER    | in        | M.mlp.language_mlp.down_proj.weight
E.boi                                    | 1 1 4096      | -         | V.boi
E.eoi                                    | 1 1 4096      | -         | V.eoi
E.linear_proj.linear_proj.weight         | 4096 1792     | -         | V.linear_proj.linear_proj.weight
E.linear_proj.norm1.weight               | 4096          | -         | V.linear_proj.norm1.weight
E.linear_proj.norm1.bias                 | 4096          | -         | V.linear_proj.norm1.bias
E.linear_proj.gate_proj.weight           | INNER 4096    | -         | V.linear_proj.gate_proj.weight
E.linear_proj.dense_h_to_4h.weight       | INNER 4096    | -         | V.linear_proj.dense_h_to_4h.weight
E.linear_proj.dense_4h_to_h.weight       | 4096 INNER    | -         | V.linear_proj.dense_4h_to_h.weight
VIT.mixins.patch_embedding.proj.weight   | 1792 3 14 14  | -         | V.patch_embedding.proj.weight
VIT.mixins.patch_embedding.proj.bias     | 1792          | -         | V.patch_embedding.proj.bias
VIT.transformer.word_embeddings.weight   | 1 1792        | -         | V.patch_embedding.cls_embedding
VIT.transformer.position_embeddings.weight | PLACES 1792   | -         | V.patch_embedding.position_embedding.weight
J.input_layernorm.weight                 | 1792          | -         | HF.input_layernorm.weight
J.input_layernorm.bias                   | 1792          | -         | HF.input_layernorm.bias
J.post_attention_layernorm.weight        | 1792          | -         | HF.post_attention_layernorm.weight
J.post_attention_layernorm.bias          | 1792          | -         | HF.post_attention_layernorm.bias
J.attention.query_key_value.weight       | 5376 1792     | col 1 1 1 | HF.attention.query_key_value.weight
J.attention.query_key_value.bias         | 5376          | col 1 1 1 | HF.attention.query_key_value.bias
J.attention.dense.weight                 | 1792 1792     | in        | HF.attention.dense.weight
J.attention.dense.bias                   | 1792          | -         | HF.attention.dense.bias
J.mlp.dense_h_to_4h.weight               | 15360 1792    | col       | HF.mlp.fc1.weight
J.mlp.dense_h_to_4h.bias                 | 15360         | col       | HF.mlp.fc1.bias
J.mlp.dense_4h_to_h.weight               | 1792 15360    | in        | HF.mlp.fc2.weight
J.mlp.dense_4h_to_h.bias                 | 1792          | -         | HF.mlp.fc2.bias
"""
_EXPERTS = """
R.vision_query_key_value_list.{i}.weight | QKV 4096 | QKVS | M.self_attn.vision_expert_query_key_value.weight
R.vision_dense_list.{i}.weight | 4096 4096     | in        | M.self_attn.vision_expert_dense.weight
mixins.mlp.vision_gate_proj.{i}.weight   | INNER 4096    | col       | M.mlp.vision_mlp.gate_proj.weight
mixins.mlp.vision_dense_h_to_4h_list.{i}.weight | INNER 4096    | col       | M.mlp.vision_mlp.up_proj.weight
mixins.mlp.vision_dense_4h_to_h_list.{i}.weight | 4096 INNER    | in        | M.mlp.vision_mlp.down_proj.weight
"""
_EXPERT_BIAS = """
R.vision_query_key_value_list.{i}.bias | QKV | QKVS | M.self_attn.vision_expert_query_key_value.bias
"""
_CONVOLUTION = """
E.conv.weight                            | 1792 1792 2 2 | -         | V.conv.weight
E.conv.bias                              | 1792          | -         | V.conv.bias
"""
_CROSS = """
L.cross_attention.query.weight           | 1024 4096     | col       | M.cross_attn.query.weight
L.cross_attention.key_value.weight       | 2048 1024     | col 1 1   | M.cross_attn.key_value.weight
L.cross_attention.dense.weight           | 4096 1024     | in        | M.cross_attn.dense.weight
L.post_cross_attention_layernorm.weight  | 4096          | -         | M.post_cross_attention_layernorm.weight
E.pos_embed                              | 256 1792      | -         | V.pos_embed
mixins.encoder.pos_embed                 | 6400 1024     | -         | model.cross_vision.pos_embed
"""
_ENCODER = """
cls_token                          | 1 1 1024
pos_embed                          | 1 6401 1024
patch_embed.proj.weight            | 1024 3 14 14
patch_embed.proj.bias              | 1024
blocks.{b}.norm1.weight            | 1024
blocks.{b}.norm1.bias              | 1024
blocks.{b}.norm2.weight            | 1024
blocks.{b}.norm2.bias              | 1024
blocks.{b}.attn.q_proj.weight      | 1024 1024
blocks.{b}.attn.k_proj.weight      | 1024 1024
blocks.{b}.attn.v_proj.weight      | 1024 1024
blocks.{b}.attn.q_bias             | 1024
blocks.{b}.attn.v_bias             | 1024
blocks.{b}.attn.inner_attn_ln.weight | 1024
blocks.{b}.attn.inner_attn_ln.bias | 1024
blocks.{b}.attn.proj.weight        | 1024 1024
blocks.{b}.attn.proj.bias          | 1024
blocks.{b}.attn.rope.freqs_cos     | 6400 64
blocks.{b}.attn.rope.freqs_sin     | 6400 64
blocks.{b}.mlp.w1.weight           | 2730 1024
blocks.{b}.mlp.w1.bias             | 2730
blocks.{b}.mlp.w2.weight           | 2730 1024
blocks.{b}.mlp.w2.bias             | 2730
blocks.{b}.mlp.w3.weight           | 1024 2730
blocks.{b}.mlp.w3.bias             | 1024
blocks.{b}.mlp.ffn_ln.weight       | 2730
blocks.{b}.mlp.ffn_ln.bias         | 2730
norm.weight                        | 1024
norm.bias                          | 1024
head.weight                        | 768 1024
head.bias                          | 768
rope.freqs_cos                     | 6400 64
rope.freqs_sin                     | 6400 64
"""
_SECOND = "".join(
    f"mixins.encoder.vit.model.{leaf.strip()} | {shape} | - | model.cross_vision.vit.model.{leaf.strip()}\n"
    for leaf, shape in (line.split("|") for line in _ENCODER.strip().split("\n"))
)
_COGVLM2 = {"VOCAB": "128256", "INNER": "14336", "QKVS": "col 4 1 1", "QKV": "6144"}
_TABLES = {
    "cogvlm2-llama3-chat-19B": (_ALL + _EXPERTS + _EXPERT_BIAS + _CONVOLUTION, {**_COGVLM2, "PLACES": "9217"}),
    "cogvlm2-video-llama3-chat": (_ALL + _CONVOLUTION, {**_COGVLM2, "PLACES": "257"}),
    "cogagent-chat": (
        _ALL + _EXPERTS + _CROSS + _SECOND,
        {"VOCAB": "32000", "INNER": "11008", "QKVS": "col 1 1 1", "QKV": "12288", "PLACES": "257"},
    ),
}
_SHORT = {
    "L": "transformer.layers.{i}", "M": "model.layers.{i}", "E": "mixins.eva", "V": "model.vision",
    "R": "mixins.rotary", "VIT": "mixins.eva.vit_model", "J": "mixins.eva.vit_model.transformer.layers.{j}",
    "HF": "model.vision.transformer.layers.{j}",
}  # fmt: skip
_COUNTS = {"i": 32, "j": 63, "b": 24}
FREQUENCIES = ("mixins.rotary.rotary_emb.inv_freq", "model.layers.{i}.self_attn.rotary_emb.inv_freq", (64,))
"""SAT's one buffer, its copies in Hugging Face's files, and the shape of each."""


def published_table(name: str) -> list[tuple[str, str, tuple[int, ...], tuple[int | None, tuple[int, ...]]]]:
    """(name in SAT, in Hugging Face, whole shape, (dimension that is cut or None, blocks)) of each, but FREQUENCIES."""
    text, values = _TABLES[name]
    values = {**_SHORT, **values}
    text = re.sub(rf"\b({'|'.join(values)})\b", lambda match: values[match[1]], text)
    rows = []
    for line in filter(None, text.split("\n")):
        sat, shape, cut, hugging_face = (cell.strip() for cell in line.split("|"))
        kind, *blocks = cut.split()
        dim = {"col": 0, "row": 0, "in": 1, "-": None}[kind]
        place = (dim, tuple(map(int, blocks)) or (1,))
        for names in expanded(sat, hugging_face):
            rows.append((*names, tuple(map(int, shape.split())), place))
    return rows


def expanded(*names: str) -> list[tuple[str, ...]]:
    """The names with each number in place of {i}, {j} or {b}; alone where they have none."""
    letter = next((letter for letter in _COUNTS if f"{{{letter}}}" in "".join(names)), None)
    numbers = range(_COUNTS[letter]) if letter else range(1)
    return [tuple(name.replace(f"{{{letter}}}", str(number)) for name in names) for number in numbers]
